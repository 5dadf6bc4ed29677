//! Whether a file is JSON Lines as training reads them: what can be said without a tokenizer.
//!
//! Owns the first thing that is wrong, with its line and field. Never keeps more than one line. The
//! thing to know: it is fed the file as it comes, and stops looking after the first mistake.

use serde::Deserialize;
use serde::de::IgnoredAny;
use std::borrow::Cow;

/// A line is a conversation: no context is so long.
const LINE_BYTES_MAX: usize = 4 << 20;
/// More examples than an adapter is trained on.
const LINES_MAX: u64 = 1_000_000;
const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// A file as far as it has come.
#[derive(Default)]
pub struct Lines {
    /// The beginning of the line that is not whole yet.
    begun: Vec<u8>,
    /// Lines that were whole.
    ended: u64,
    examples: u64,
    problem: Option<String>,
}

/// One example, as far as it is looked at.
#[derive(Deserialize)]
struct Example<'a> {
    #[serde(borrow)]
    messages: Option<Vec<Message<'a>>>,
    prompt: Option<IgnoredAny>,
    completion: Option<IgnoredAny>,
    input: Option<IgnoredAny>,
    preferred_output: Option<IgnoredAny>,
    non_preferred_output: Option<IgnoredAny>,
}

#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow)]
    role: Cow<'a, str>,
}

impl Lines {
    pub fn feed(&mut self, mut bytes: &[u8]) {
        while self.problem.is_none() {
            let Some(end) = bytes.iter().position(|b| *b == b'\n') else {
                self.begun.extend_from_slice(bytes);
                if self.begun.len() > LINE_BYTES_MAX {
                    let long = std::mem::take(&mut self.begun);
                    self.line(&long);
                }
                return;
            };
            let (line, rest) = bytes.split_at(end);
            match self.begun.is_empty() {
                true => self.line(line),
                false => {
                    let mut whole = std::mem::take(&mut self.begun);
                    whole.extend_from_slice(line);
                    self.line(&whole);
                }
            }
            bytes = &rest[1..];
        }
        self.begun = Vec::new();
    }

    /// What is wrong with the file, if anything is.
    pub fn end(mut self) -> Option<String> {
        let last = std::mem::take(&mut self.begun);
        if self.problem.is_none() && !last.is_empty() {
            self.line(&last);
        }
        if self.problem.is_none() && self.examples == 0 {
            self.problem = Some("no line has an example".to_owned());
        }
        self.problem
    }

    fn line(&mut self, line: &[u8]) {
        self.ended += 1;
        let number = self.ended;
        if line.len() > LINE_BYTES_MAX {
            self.problem = Some(format!("line {number} is longer than {LINE_BYTES_MAX} bytes"));
        } else if number > LINES_MAX {
            self.problem = Some(format!("the file has more than {LINES_MAX} lines"));
        } else if number == 1 && line.starts_with(BYTE_ORDER_MARK) {
            let message = "line 1 begins with a byte order mark: save the file as UTF-8 without it";
            self.problem = Some(message.to_owned());
        } else if !line.iter().all(u8::is_ascii_whitespace) {
            self.examples += 1;
            self.problem = wrong(line).map(|what| format!("line {number}: {what}"));
        }
    }
}

/// What is wrong with one line.
fn wrong(line: &[u8]) -> Option<String> {
    let line = match std::str::from_utf8(line) {
        Ok(line) => line,
        Err(e) => return Some(format!("byte {} is not UTF-8", e.valid_up_to() + 1)),
    };
    if !line.trim_start().starts_with('{') {
        return Some("not a JSON object".to_owned());
    }
    let mut reader = serde_json::Deserializer::from_str(line);
    let example: Example<'_> = match serde_path_to_error::deserialize(&mut reader) {
        Ok(example) => example,
        Err(e) => {
            let (path, inner) = (e.path().to_string(), e.inner());
            let reason = inner.to_string();
            let reason = reason.split(" at line ").next().unwrap_or_default();
            let at = inner.column();
            return Some(match inner.is_data() {
                true if path == "." => reason.to_owned(),
                true => format!("`{path}`: {reason}"),
                false => format!("column {at}: {reason}"),
            });
        }
    };
    if reader.end().is_err() {
        return Some("more follows the JSON object".to_owned());
    }
    lacks(&example)
}

/// What an example of its form lacks.
fn lacks(example: &Example<'_>) -> Option<String> {
    let answer = [("completion", example.completion.is_some())];
    let pair = [
        ("preferred_output", example.preferred_output.is_some()),
        ("non_preferred_output", example.non_preferred_output.is_some()),
    ];
    let needed = if let Some(messages) = &example.messages {
        if messages.is_empty() {
            return Some("`messages` is empty".to_owned());
        }
        let blank = messages.iter().position(|message| message.role.is_empty());
        return blank.map(|at| format!("`messages[{at}].role` is empty"));
    } else if example.input.is_some() {
        &pair[..]
    } else if example.prompt.is_some() {
        &answer[..]
    } else {
        let forms = "`messages`, `prompt` with `completion`, or `input` with two outputs";
        return Some(format!("no example has this form: it needs {forms}"));
    };
    let missing = needed.iter().find(|(_, there)| !there);
    missing.map(|(field, _)| format!("`{field}` is missing"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fed whole, and byte by byte.
    fn problem(file: &[u8]) -> Option<String> {
        let mut whole = Lines::default();
        whole.feed(file);
        let mut slowly = Lines::default();
        file.chunks(1).for_each(|byte| slowly.feed(byte));
        let (whole, slowly) = (whole.end(), slowly.end());
        assert_eq!(whole, slowly);
        whole
    }

    #[test]
    fn files_that_training_reads_have_no_problem() {
        let chat = r#"{"messages": [{"role": "user", "content": "a"}], "more": [[[1]]]}"#;
        let pair = r#"{"input": {}, "preferred_output": [], "non_preferred_output": []}"#;
        let plain = r#"{"prompt": "a\u00e4", "completion": "b"}"#;
        let (open, shut) = ("[".repeat(9999), "]".repeat(9999));
        for file in [
            format!("{chat}\n{pair}\n\n{plain}\n"),
            format!("\r\n {chat}\r\n{pair}"),
            format!("{plain}\n \t \n"),
            format!("{{\"messages\": [{{\"role\": \"a\", \"x\": {open}{shut}}}]}}"),
        ] {
            assert_eq!(problem(file.as_bytes()), None, "{}", &file[..40]);
        }
    }

    #[test]
    fn what_is_wrong_is_named_by_line_and_field() {
        let good = r#"{"prompt": "a", "completion": "b"}"#;
        for (bad, what) in [
            (&b"{\"messages\": [{\"role\": 7}]}"[..], "`messages[0].role`: invalid type"),
            (b"{\"messages\": [{\"role\": \"\"}]}", "`messages[0].role` is empty"),
            (b"{\"messages\": [{\"role\": \"u\"}, {}]}", "`messages[1]`: missing field `role`"),
            (b"{\"messages\": []}", "`messages` is empty"),
            (b"{\"messages\": {}}", "`messages`: invalid type"),
            (b"{\"prompt\": \"a\"}", "`completion` is missing"),
            (b"{\"input\": {}, \"preferred_output\": []}", "`non_preferred_output` is missing"),
            (b"{\"text\": \"a\"}", "no example has this form"),
            (b"[1]", "not a JSON object"),
            (b"{\"prompt\": \"a\", \"completion\": \"b\"} {}", "more follows"),
            (b"{\"prompt\": \"a\"", "column 14: EOF while parsing"),
            (b"{\"prompt\": \"\xff\", \"completion\": 1}", "byte 13 is not UTF-8"),
        ] {
            let file = [good.as_bytes(), b"\n\n", bad, b"\n", good.as_bytes()].concat();
            let said = problem(&file).expect("a problem");
            assert!(said.starts_with("line 3: ") && said.contains(what), "{said}");
        }
        assert_eq!(problem(b" \n\n").as_deref(), Some("no line has an example"));
        assert!(problem(b"\xEF\xBB\xBF{}").expect("a problem").contains("byte order mark"));
        let mut long = Lines::default();
        (0..5).for_each(|_| long.feed(&[b'x'; 1 << 20]));
        assert_eq!(long.begun.len(), 0, "nothing of it is kept");
        assert_eq!(long.end().as_deref(), Some("line 1 is longer than 4194304 bytes"));
    }
}
