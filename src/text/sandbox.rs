//! Untrusted templates run in another process.
//!
//! Owns the worker processes, their limits and the frames between. Never trusts a worker: what it
//! takes too long for, or dies of, is the template's fault and ends that request only. The thing to
//! know: fuel bounds a template's steps, but not the memory of one step nor the native stack of
//! printing or comparing a value that holds itself; an address-space limit and a process do.
//!
//! A frame is its length (u32 LE), then bytes. Down: a `Job` as JSON. Up: one byte (a `Reply`), and
//! the prompt, or an `Refusal` as JSON.

use super::samples::invalid;
use super::template::{ChatInputs, ChatTemplate, OUTPUT_BYTES_MAX, cut, exceeded};
use crate::error::{Error, Kind, Result};
use rlimit::{Resource, setrlimit};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::borrow::Cow;
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The hidden command that a worker is started with.
pub const COMMAND: &str = "render-templates";
/// Address space of a worker, its program included.
pub const WORKER_BYTES_MAX: u64 = 512 << 20;
/// Resident bytes after which a worker ends, so that one large prompt is not held for ever.
const WORKER_BYTES_KEPT: u64 = 48 << 20;
/// Workers give way to what serves: a tenth of its share of a core, where both want it.
#[cfg(target_os = "linux")]
const NICE: i32 = 10;
/// For one job, a worker's start included. Fuel ends a loop long before.
const JOB_TIME_MAX: Duration = Duration::from_secs(5);
const FRAME_BYTES_MAX: usize = 64 << 20;
/// Workers kept while nobody needs them.
const IDLE_MAX: usize = 2;
/// Templates that a worker keeps compiled.
const COMPILED_MAX: usize = 16;

/// A template as a bundle has it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TemplateSource {
    /// One template, or a JSON array of named ones; see [`ChatTemplate::new`].
    pub text: String,
    pub bos_token: Option<String>,
    pub eos_token: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct Job<'a> {
    template: Cow<'a, TemplateSource>,
    /// `None`: the trial of an upload.
    chat: Option<Chat<'a>>,
}

#[derive(Serialize, Deserialize)]
struct Chat<'a> {
    messages: Cow<'a, [Value]>,
    tools: Option<Cow<'a, Value>>,
    add_generation_prompt: bool,
    /// Unix seconds
    now: u64,
    /// Of the prompt.
    bytes_max: usize,
}

/// An error on its way up.
#[derive(Serialize, Deserialize)]
struct Refusal {
    code: String,
    message: String,
    param: Option<String>,
}

/// First byte of a frame from a worker; `+ LAST` when the worker ends after it.
const PROMPT: u8 = 0;
const REFUSAL: u8 = 1;
const LAST: u8 = 2;

/// Codes that a worker may answer with.
const CODES: [&str; 5] = [
    "chat_template_error",
    "context_length_exceeded",
    "invalid_chat_template",
    "unsupported_chat_template",
    "unsupported_content_part",
];

/// Worker processes for templates that came with adapters. Usable from any thread; calls block.
pub struct Sandbox {
    program: PathBuf,
    idle: Mutex<Vec<Worker>>,
}

impl Sandbox {
    /// `program` is a `polylora` binary; nothing is started yet.
    pub fn new(program: &Path) -> Self {
        Self { program: program.to_owned(), idle: Mutex::new(Vec::new()) }
    }

    /// The running program, also after its file was replaced.
    pub fn of_this_program() -> Result<Self> {
        let own = Path::new("/proc/self/exe");
        if own.exists() {
            return Ok(Self::new(own));
        }
        let program = std::env::current_exe();
        program.map(|p| Self::new(&p)).map_err(|e| Error::fault(format!("this program: {e}")))
    }

    /// Compiles a template and renders the trial's conversations. Errors: `invalid_chat_template`.
    pub fn check(&self, template: &TemplateSource) -> Result<()> {
        let job = Job { template: Cow::Borrowed(template), chat: None };
        self.run(&job).map(drop).map_err(|e| match e.kind {
            Kind::Fault => e,
            _ => invalid(e.message),
        })
    }

    /// The prompt. Errors: `chat_template_error`, `unsupported_content_part`.
    pub fn render(&self, template: &TemplateSource, inputs: &ChatInputs) -> Result<String> {
        self.render_within(template, inputs, OUTPUT_BYTES_MAX)
    }

    /// The same, with at most `bytes_max` bytes of prompt. Errors: also `context_length_exceeded`.
    pub fn render_within(
        &self,
        template: &TemplateSource,
        inputs: &ChatInputs,
        bytes_max: usize,
    ) -> Result<String> {
        let now = inputs.now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let job = Job {
            template: Cow::Borrowed(template),
            chat: Some(Chat {
                messages: Cow::Borrowed(inputs.messages),
                tools: inputs.tools.map(Cow::Borrowed),
                add_generation_prompt: inputs.add_generation_prompt,
                now,
                bytes_max,
            }),
        };
        let prompt = self.run(&job)?;
        // A worker runs an untrusted program: its word alone is not taken.
        if prompt.len() > bytes_max { Err(exceeded(bytes_max)) } else { Ok(prompt) }
    }

    fn run(&self, job: &Job) -> Result<String> {
        let frame = serde_json::to_vec(job).map_err(|e| Error::fault(format!("a job: {e}")))?;
        loop {
            let kept = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let (mut worker, fresh) = match kept {
                Some(worker) => (worker, false),
                None => (Worker::start(&self.program)?, true),
            };
            match worker.ask(&frame) {
                Ok(answer) => {
                    let (kind, body) = answer.split_first().unwrap_or((&LAST, &[]));
                    if kind & LAST == 0 {
                        self.keep(worker);
                    }
                    return read_answer(kind & !LAST, body);
                }
                // One that sat idle may have died of something else.
                Err(End::Died) if !fresh => {}
                Err(end) => return Err(end.error()),
            }
        }
    }

    fn keep(&self, worker: Worker) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < IDLE_MAX {
            idle.push(worker);
        }
    }
}

fn read_answer(kind: u8, body: &[u8]) -> Result<String> {
    let garbled = |_| Error::fault("a template worker's answer is not readable");
    if kind == PROMPT {
        return String::from_utf8(body.to_vec()).map_err(|e| garbled(e.to_string()));
    }
    let refusal: Refusal = serde_json::from_slice(body).map_err(|e| garbled(e.to_string()))?;
    let code = CODES.iter().find(|c| **c == refusal.code);
    let Some(code) = code else {
        return Err(Error::fault(refusal.message));
    };
    Err(Error { param: refusal.param, ..Error::new(Kind::Invalid, code, refusal.message) })
}

/// How a worker ended instead of answering.
enum End {
    Late,
    Died,
}

impl End {
    fn error(&self) -> Error {
        let message = match self {
            Self::Late => format!("the chat template took longer than {JOB_TIME_MAX:?}"),
            Self::Died => format!(
                "the chat template used more than {WORKER_BYTES_MAX} bytes of memory or nested \
                 without end"
            ),
        };
        Error::invalid("chat_template_error", message).param("messages")
    }
}

/// A process, killed when dropped.
struct Worker {
    child: Child,
    stdin: ChildStdin,
    /// Read on a thread of its own, so that waiting for an answer can end.
    answers: Receiver<Vec<u8>>,
}

impl Worker {
    fn start(program: &Path) -> Result<Self> {
        let failed = |what: &str| Error::fault(format!("a template worker did not start: {what}"));
        let mut child = Command::new(program)
            .arg(COMMAND)
            .env_clear() // no key of the operator's is in it
            .process_group(0) // Ctrl-C at the terminal is the server's to act on
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| failed(&e.to_string()))?;
        let stdin = child.stdin.take().ok_or_else(|| failed("no stdin"))?;
        let mut stdout = child.stdout.take().ok_or_else(|| failed("no stdout"))?;
        let (sender, answers) = sync_channel(1);
        let reading = move || {
            while let Ok(frame) = read_frame(&mut stdout) {
                if sender.send(frame).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("template".into()).spawn(reading);
        thread.map_err(|e| failed(&e.to_string()))?;
        Ok(Self { child, stdin, answers })
    }

    fn ask(&mut self, frame: &[u8]) -> Result<Vec<u8>, End> {
        // A worker reads a job whole before it begins, so writing does not wait for a template.
        write_frame(&mut self.stdin, &[frame]).map_err(|_| End::Died)?;
        self.answers.recv_timeout(JOB_TIME_MAX).map_err(|e| match e {
            RecvTimeoutError::Timeout => End::Late,
            RecvTimeoutError::Disconnected => End::Died,
        })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_frame(from: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > FRAME_BYTES_MAX.max(OUTPUT_BYTES_MAX + 1) {
        return Err(io::Error::other("a frame is too long"));
    }
    let mut frame = vec![0; length];
    from.read_exact(&mut frame)?;
    Ok(frame)
}

fn write_frame(to: &mut impl Write, parts: &[&[u8]]) -> io::Result<()> {
    let length: usize = parts.iter().map(|p| p.len()).sum();
    let length = u32::try_from(length).map_err(io::Error::other)?;
    to.write_all(&length.to_le_bytes())?;
    parts.iter().try_for_each(|part| to.write_all(part))?;
    to.flush()
}

/// The worker's side: limits itself, then answers jobs from stdin on stdout until stdin ends.
pub fn work() -> Result<()> {
    let failed = |e: io::Error| Error::fault(format!("the template worker: {e}"));
    let limits = [(Resource::AS, WORKER_BYTES_MAX), (Resource::CORE, 0), (Resource::FSIZE, 0)];
    for (resource, most) in limits {
        setrlimit(resource, most, most).map_err(failed)?;
    }
    #[cfg(target_os = "linux")]
    rustix::process::nice(NICE).map_err(|e| failed(e.into()))?;
    let (mut input, mut output) = (io::stdin().lock(), io::stdout().lock());
    let mut compiled: Vec<(TemplateSource, ChatTemplate)> = Vec::new();
    while let Ok(frame) = read_frame(&mut input) {
        let done = answer(&frame, &mut compiled);
        let last = if resident_bytes_peak() > WORKER_BYTES_KEPT { LAST } else { 0 };
        match done {
            Ok(prompt) => write_frame(&mut output, &[&[PROMPT | last], prompt.as_bytes()]),
            Err(e) => {
                let (code, message) = (e.code.to_owned(), cut(e.message));
                let refusal = Refusal { code, message, param: e.param };
                let body = serde_json::to_vec(&refusal).unwrap_or_default();
                write_frame(&mut output, &[&[REFUSAL | last], &body])
            }
        }
        .map_err(failed)?;
        if last != 0 {
            break;
        }
    }
    Ok(())
}

fn answer(frame: &[u8], compiled: &mut Vec<(TemplateSource, ChatTemplate)>) -> Result<String> {
    let job: Job =
        serde_json::from_slice(frame).map_err(|e| Error::fault(format!("a job: {e}")))?;
    let at = match compiled.iter().position(|(source, _)| *source == *job.template) {
        Some(at) => at,
        None => {
            let source = job.template.into_owned();
            let (bos, eos) = (source.bos_token.clone(), source.eos_token.clone());
            let template = ChatTemplate::new(&source.text, bos, eos)?;
            compiled.truncate(COMPILED_MAX - 1);
            compiled.insert(0, (source, template));
            0
        }
    };
    let template = &compiled[at].1;
    let Some(chat) = job.chat else {
        return template.check().map(|()| String::new());
    };
    let inputs = ChatInputs {
        messages: &chat.messages,
        tools: chat.tools.as_deref(),
        add_generation_prompt: chat.add_generation_prompt,
        now: UNIX_EPOCH.checked_add(Duration::from_secs(chat.now)).unwrap_or(SystemTime::now()),
    };
    template.render_within(&inputs, chat.bytes_max)
}

/// Most memory that this process ever had; 0 where the system does not say.
fn resident_bytes_peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|l| l.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kilobytes.unwrap_or(0) << 10
}
