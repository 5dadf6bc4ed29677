//! Chat templates in a sandbox.
//!
//! Owns the Jinja environment, set up as transformers sets up its own, and the small repairs of
//! messages that templates count on. Never encodes. The thing to know: a template has no files, no
//! other templates, no clock but `strftime_now`, a budget of steps and of output; where it fails on
//! a client's messages, that is the client's error, in the template's words. An untrusted
//! template is rendered in another process besides (`sandbox`): memory has no budget here.
//!
//! Messages are passed as they came, except: text parts of `content` are joined by a newline unless
//! the template reads parts itself (it iterates over something named content); `arguments` of a
//! tool call become an object when they are a string that holds one. A content part that is not
//! text is refused: the models served here read text.

use super::python;
use crate::error::{Error, Result};
use fancy_regex::Regex;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, ErrorKind, Output, State, context};
use serde_json::Value as Json;
use std::borrow::Cow;
use std::io;
use std::time::SystemTime;

/// Steps a template may take. A long conversation takes some ten thousand.
const FUEL: u64 = 4_000_000;
/// Bytes a template may write.
pub(super) const OUTPUT_BYTES_MAX: usize = 32 << 20;
/// Characters that a template may say when it refuses messages.
pub(super) const WORDS_CHARS_MAX: usize = 1000;
const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// A compiled template, or two: some models have another one for requests with tools.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Names of the templates that read content parts themselves.
    part_readers: Vec<String>,
    /// `None` is undefined in the template, as in transformers.
    bos_token: Option<String>,
    eos_token: Option<String>,
}

/// What a template is rendered with.
pub struct ChatInputs<'a> {
    /// OpenAI messages, JSON objects.
    pub messages: &'a [Json],
    /// OpenAI tools, a JSON array.
    pub tools: Option<&'a Json>,
    /// Whether to end with the opening of the assistant's turn.
    pub add_generation_prompt: bool,
    /// What `strftime_now` formats.
    pub now: SystemTime,
}

impl ChatTemplate {
    /// `source`: one template, or a JSON array of `{"name", "template"}` with one named `default`;
    /// one named `tool_use` is taken for requests with tools. Errors: `unsupported_chat_template`
    /// with the line.
    pub fn new(source: &str, bos_token: Option<String>, eos_token: Option<String>) -> Result<Self> {
        let mut template =
            Self { environment: environment(), part_readers: Vec::new(), bos_token, eos_token };
        for (name, source) in named(source)? {
            let source = without_generation_blocks(&source)?;
            refuse_other_templates(&source)?;
            if reads_parts(&source)? {
                template.part_readers.push(name.clone());
            }
            template
                .environment
                .add_template_owned(name, source)
                .map_err(|e| unsupported(format!("the chat template does not compile: {e}")))?;
        }
        Ok(template)
    }

    /// Errors: `chat_template_error`, `unsupported_content_part`.
    pub fn render(&self, inputs: &ChatInputs) -> Result<String> {
        self.render_within(inputs, OUTPUT_BYTES_MAX)
    }

    /// The same, with at most `bytes_max` bytes of prompt. Errors: also `context_length_exceeded`,
    /// where the bound is not the template's own.
    pub fn render_within(&self, inputs: &ChatInputs, bytes_max: usize) -> Result<String> {
        self.attempt(inputs, bytes_max)?.map_err(|e| match e.kind() {
            ErrorKind::WriteFailure if bytes_max < OUTPUT_BYTES_MAX => exceeded(bytes_max),
            _ => refused(&e),
        })
    }

    /// As `render`, with the template's own failure as the engine tells it.
    pub(super) fn attempt(
        &self,
        inputs: &ChatInputs,
        bytes_max: usize,
    ) -> Result<Result<String, minijinja::Error>> {
        let template = match inputs.tools {
            Some(_) => self.environment.get_template(TOOL_USE).ok(),
            None => None,
        };
        let template = match template {
            Some(template) => template,
            None => self
                .environment
                .get_template(DEFAULT)
                .map_err(|e| Error::fault(format!("the chat template is gone: {e}")))?,
        };
        let reads_parts = self.part_readers.iter().any(|n| n == template.name());
        let messages: Vec<Cow<Json>> = inputs
            .messages
            .iter()
            .enumerate()
            .map(|(i, message)| prepared(i, message, reads_parts))
            .collect::<Result<_>>()?;
        let now = inputs.now;
        let variables = context! {
            messages => Value::from_serialize(&messages),
            tools => inputs.tools.map_or(Value::from(()), Value::from_serialize),
            documents => Value::from(()),
            add_generation_prompt => inputs.add_generation_prompt,
            bos_token => defined(&self.bos_token),
            eos_token => defined(&self.eos_token),
            strftime_now => Value::from_function(move |format: &str| python::strftime(now, format)),
        };
        let mut output = Bounded { bytes: Vec::new(), bytes_max: bytes_max.min(OUTPUT_BYTES_MAX) };
        if let Err(error) = template.render_captured_to(variables, &mut output) {
            return Ok(Err(error));
        }
        let text = String::from_utf8(output.bytes);
        text.map(Ok).map_err(|e| Error::fault(format!("the chat template: {e}")))
    }
}

/// Jinja as transformers sets it up, with Python's methods and printing.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_fuel(Some(FUEL));
    environment.set_debug(false);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(|out: &mut Output, _: &State, value: &Value| {
        python::write_str(out, value).map_err(minijinja::Error::from)
    });
    environment.add_function("raise_exception", raise_exception);
    environment.add_filter("tojson", tojson);
    environment.add_filter("string", |value: &Value| -> Result<String, minijinja::Error> {
        let mut text = String::new();
        python::write_str(&mut text, value)?;
        Ok(text)
    });
    environment
}

/// The template's own refusal.
#[derive(Debug)]
struct Raised(String);

impl std::fmt::Display for Raised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    let message = cut(message);
    let error = minijinja::Error::new(ErrorKind::InvalidOperation, "raised by the template");
    Err(error.with_source(Raised(message)))
}

/// `tojson` with the arguments that transformers gives it: Python's spacing, no HTML escapes.
fn tojson(value: &Value, args: Kwargs) -> Result<Value, minijinja::Error> {
    let indent: Option<usize> = args.get("indent")?;
    let separators: Option<Vec<String>> = args.get("separators")?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => {
            return Err(minijinja::Error::new(
                ErrorKind::InvalidOperation,
                "separators of tojson are two strings",
            ));
        }
        None if indent.is_some() => (",".into(), ": ".into()),
        None => (", ".into(), ": ".into()),
    };
    let json = python::Json {
        indent,
        item_separator: item,
        key_separator: key,
        ensure_ascii: args.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: args.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    args.assert_all_used()?;
    Ok(Value::from(json.dumps(value)?))
}

/// The templates of a model by name.
fn named(source: &str) -> Result<Vec<(String, String)>> {
    // A template that begins with `[` is no JSON, so the two cannot be mistaken.
    let listed = match source.trim_start().starts_with('[') {
        true => serde_json::from_str::<Vec<Json>>(source).ok(),
        false => None,
    };
    let Some(listed) = listed else {
        return Ok(vec![(DEFAULT.into(), source.into())]);
    };
    let mut templates = Vec::new();
    let mut names = Vec::new();
    for entry in &listed {
        let (Some(name), Some(template)) = (entry["name"].as_str(), entry["template"].as_str())
        else {
            return Err(unsupported(
                "an entry of the chat template list lacks `name` or `template`".into(),
            ));
        };
        names.push(name);
        if [DEFAULT, TOOL_USE].contains(&name) {
            templates.push((name.to_owned(), template.to_owned()));
        }
    }
    match names.contains(&DEFAULT) {
        true => Ok(templates),
        false => Err(unsupported(format!(
            "the chat template list has none named `default`, only {names:?}"
        ))),
    }
}

/// `{% generation %}` marks the assistant's words for training; to render it is a block that always
/// holds.
fn without_generation_blocks(source: &str) -> Result<String> {
    let opening = regex(r"\{%([-+]?)\s*generation\s*([-+]?)%\}")?;
    let closing = regex(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}")?;
    let source = opening.replace_all(source, "{%${1} if true ${2}%}");
    Ok(closing.replace_all(&source, "{%${1} endif ${2}%}").into_owned())
}

/// There are no other templates to include, import or extend; with none registered the engine would
/// say so only when it comes to that line.
fn refuse_other_templates(source: &str) -> Result<()> {
    let statement = regex(r"\{%[-+]?\s*(include|import|extends|from)\b")?;
    let found = statement.captures(source).ok().flatten();
    let Some((whole, word)) = found.and_then(|c| Some((c.get(0)?, c.get(1)?))) else {
        return Ok(());
    };
    let line = source[..whole.start()].matches('\n').count() + 1;
    Err(unsupported(format!("the chat template uses `{}` in line {line}", word.as_str())))
}

/// Whether the template goes through content parts itself.
fn reads_parts(source: &str) -> Result<bool> {
    regex(r#"\{%[-+]?\s*for\s+\w+\s+in\s+[\w.\[\]'"]*content\b"#)?
        .is_match(source)
        .map_err(|e| Error::fault(format!("looking for content parts in the template: {e}")))
}

fn regex(pattern: &str) -> Result<Regex> {
    Regex::new(pattern).map_err(|e| Error::fault(format!("pattern {pattern}: {e}")))
}

/// The message as the template is to see it.
fn prepared(index: usize, message: &Json, reads_parts: bool) -> Result<Cow<'_, Json>> {
    let mut message = Cow::Borrowed(message);
    if let Some(parts) = message["content"].as_array() {
        let text = text_of_parts(index, parts)?;
        if !reads_parts {
            message.to_mut()["content"] = text.into();
        }
    }
    let calls = message["tool_calls"].as_array().map_or(0, Vec::len);
    for call in 0..calls {
        let arguments = message["tool_calls"][call]["function"]["arguments"].as_str();
        if let Some(object @ Json::Object(_)) =
            arguments.and_then(|text| serde_json::from_str(text).ok())
        {
            message.to_mut()["tool_calls"][call]["function"]["arguments"] = object;
        }
    }
    Ok(message)
}

fn text_of_parts(index: usize, parts: &[Json]) -> Result<String> {
    let mut texts = Vec::new();
    for (i, part) in parts.iter().enumerate() {
        match (part["type"].as_str(), part["text"].as_str()) {
            (Some("text"), Some(text)) => texts.push(text),
            (kind, _) => {
                let param = format!("messages[{index}].content[{i}]");
                return Err(Error::invalid(
                    "unsupported_content_part",
                    format!(
                        "{param} is of type `{}`; only parts of type `text` with a \
                         string `text` are supported",
                        kind.unwrap_or("none")
                    ),
                )
                .param(param));
            }
        }
    }
    Ok(texts.join("\n"))
}

fn defined(token: &Option<String>) -> Value {
    token.as_ref().map_or(Value::UNDEFINED, |t| Value::from(t.as_str()))
}

fn unsupported(message: String) -> Error {
    Error::invalid("unsupported_chat_template", message)
}

/// What the template itself said to refuse the messages.
pub(super) fn raised(error: &minijinja::Error) -> Option<String> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    let mut words = None;
    while let Some(e) = cause {
        if let Some(raised) = e.downcast_ref::<Raised>() {
            words = Some(raised.0.clone());
        }
        cause = e.source();
    }
    words
}

/// The client's error, in the template's words where it has any.
pub(super) fn refused(error: &minijinja::Error) -> Error {
    let message = match (raised(error), error.kind()) {
        (Some(words), _) => format!("the chat template refused the messages: {words}"),
        (None, ErrorKind::OutOfFuel) => {
            format!("the chat template took more than {FUEL} steps for these messages")
        }
        (None, ErrorKind::WriteFailure) => {
            format!("the chat template wrote more than {OUTPUT_BYTES_MAX} bytes for these messages")
        }
        (None, _) => format!("the chat template failed on these messages: {error}"),
    };
    Error::invalid("chat_template_error", message).param("messages")
}

/// Cuts what a template says to what is passed on.
pub(super) fn cut(mut words: String) -> String {
    crate::error::cut(&mut words, WORDS_CHARS_MAX);
    words
}

/// The conversation is too long as this template writes it.
pub(super) fn exceeded(bytes_max: usize) -> Error {
    let message = format!(
        "the chat template writes more than {bytes_max} bytes for these messages, and no more can \
         be the tokens of a context"
    );
    Error::invalid("context_length_exceeded", message).param("messages")
}

/// Takes `bytes_max` bytes and no more.
struct Bounded {
    bytes: Vec<u8>,
    bytes_max: usize,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.bytes_max {
            return Err(io::Error::other("the output is too long"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
