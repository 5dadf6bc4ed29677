//! Where answers begin and end in a rendered chat.
//!
//! Owns the cut into supervised and other text. Never encodes. The thing to know: a border is found
//! by rendering what comes before the answer as a request would, never by looking for a header.

use super::form::{Chat, Pair, wrong};
use super::problems::Stop;
use crate::text::Text;
use crate::text::sandbox::{Sandbox, TemplateSource};
use crate::text::template::ChatInputs;
use serde_json::{Value, json};
use std::time::SystemTime;

/// What a template may write between the opening of an answer and its content.
const OPENING_BYTES_MAX: usize = 256;
/// A shorter match of two renderings is chance.
const MATCH_BYTES_MIN: usize = 4;

/// A stretch of text that is encoded by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    pub text: String,
    pub supervised: bool,
    pub form: Form,
}

/// How a piece becomes ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// As a prompt that stands alone: with what the tokenizer puts in front of one.
    Prompt,
    /// As text with its special tokens written out.
    Rendered,
    Token(u32),
}

impl Piece {
    fn rendered(text: &str, supervised: bool) -> Self {
        Self { text: text.to_owned(), supervised, form: Form::Rendered }
    }
}

/// What ends an answer.
pub struct Ends {
    /// Tokens at which serving stops.
    stops: Vec<String>,
    /// Every special token, for templates that end an answer with another one.
    special: Vec<String>,
}

impl Ends {
    pub fn of(text: &Text) -> Self {
        let added = text.tokenizer.get_added_tokens_decoder();
        let special = added.values().filter(|token| token.special && !token.content.is_empty());
        Self {
            stops: text.eos.iter().filter_map(|id| text.tokenizer.id_to_token(*id)).collect(),
            special: special.map(|token| token.content.clone()).collect(),
        }
    }

    /// Where the answer ends in `tail`, which begins with it: behind the first of these tokens
    /// after the content, or behind the last where the content is not written as it came.
    fn after(&self, answer: &Value, tail: &str) -> Option<usize> {
        let content = answer["content"].as_str().unwrap_or_default();
        let called = answer.get("tool_calls").is_some();
        let written = if called { None } else { end_of_content(tail, content) };
        let last = |marks: &[String]| {
            let ends = marks.iter().filter_map(|m| tail.rfind(m.as_str()).map(|at| at + m.len()));
            ends.max()
        };
        let first = |marks: &[String]| {
            let from = written?;
            let found = marks.iter().filter_map(|m| Some((tail[from..].find(m.as_str())?, m)));
            // Of two that begin together the longer one is the token.
            let (at, mark) = found.min_by_key(|(at, m)| (*at, usize::MAX - m.len()))?;
            Some(from + at + mark.len())
        };
        let of = |marks: &[String]| first(marks).or_else(|| last(marks));
        of(&self.stops).or_else(|| of(&self.special))
    }
}

/// Where the content ends, as far as the template wrote it as it came.
fn end_of_content(tail: &str, content: &str) -> Option<usize> {
    let last = content.lines().rev().map(str::trim).find(|line| !line.is_empty());
    if content.is_empty() {
        return Some(0);
    }
    let written = [Some(content), Some(content.trim()), last].into_iter().flatten();
    let mut written = written.filter(|text| !text.is_empty());
    written.find_map(|text| tail.find(text).map(|at| at + text.len()))
}

/// What renders a chat, as serving does.
#[derive(Clone, Copy)]
pub struct Template<'a> {
    pub text: &'a Text,
    /// In place of the base's.
    pub own: Option<(&'a Sandbox, &'a TemplateSource)>,
    pub now: SystemTime,
    /// Bytes of text that it may write.
    pub bytes_max: usize,
}

/// Renders the messages of one line.
pub struct Rendering<'a> {
    pub template: Template<'a>,
    pub ends: &'a Ends,
    pub tools: Option<&'a Value>,
    pub over: &'a dyn Fn() -> bool,
}

impl Rendering<'_> {
    /// Examples of a chat: one, or one an answer where the template shows an answer in another way
    /// once the chat goes on. None of them where no answer is supervised.
    pub fn chat(&self, chat: &Chat) -> Result<Vec<Vec<Piece>>, Stop> {
        if chat.supervised.is_empty() {
            return Ok(Vec::new());
        }
        if let Some(whole) = self.whole(chat)? {
            return Ok(vec![whole]);
        }
        chat.supervised.iter().map(|&i| self.last_answer(&chat.messages[..=i])).collect()
    }

    /// The preferred answer's example, and the other's.
    pub fn pair(&self, pair: &Pair) -> Result<[Vec<Piece>; 2], Stop> {
        let mut messages = pair.messages.clone();
        let mut with = |answer: &Value| {
            messages.truncate(pair.messages.len());
            messages.push(answer.clone());
            self.last_answer(&messages)
        };
        Ok([with(&pair.preferred)?, with(&pair.other)?])
    }

    /// All answers in one example, if messages up to an answer are a prefix of the whole.
    fn whole(&self, chat: &Chat) -> Result<Option<Vec<Piece>>, Stop> {
        let full = self.render(&chat.messages, false)?;
        let (mut pieces, mut at) = (Vec::new(), 0);
        for &i in &chat.supervised {
            let before = self.render(&chat.messages[..i], true)?;
            let through = match i + 1 == chat.messages.len() {
                true => full.clone(),
                false => self.render(&chat.messages[..=i], false)?,
            };
            if before.len() < at || !through.starts_with(&before) || !full.starts_with(&through) {
                return Ok(None);
            }
            let end = before.len() + self.end(&chat.messages[i], &through[before.len()..])?;
            pieces.push(Piece::rendered(&full[at..before.len()], false));
            pieces.push(Piece::rendered(&full[before.len()..end], true));
            at = end;
        }
        pieces.push(Piece::rendered(&full[at..], false));
        Ok(Some(pieces))
    }

    /// The last of these messages, after what a request with the others would be rendered as.
    fn last_answer(&self, messages: &[Value]) -> Result<Vec<Piece>, Stop> {
        let Some((answer, before)) = messages.split_last() else { return Ok(Vec::new()) };
        let before = self.render(before, true)?;
        let through = self.render(messages, false)?;
        let at = match through.starts_with(&before) {
            true => before.len(),
            false => self.border(messages, &before, &through)?,
        };
        let end = at + self.end(answer, &through[at..])?;
        Ok(vec![
            Piece::rendered(&before, false),
            Piece::rendered(&through[at..end], true),
            Piece::rendered(&through[end..], false),
        ])
    }

    fn end(&self, answer: &Value, tail: &str) -> Result<usize, Stop> {
        let missing = "the chat template writes no special token after an answer, so a model \
                       trained on it would never stop";
        self.ends.after(answer, tail).ok_or_else(|| wrong(missing).into())
    }

    /// Where the last message begins in `through`, which does not begin with `before`: where what
    /// precedes it is most like the end of `before`, at the latest where another content would
    /// change the text.
    fn border(&self, messages: &[Value], before: &str, through: &str) -> Result<usize, Stop> {
        let mut messages = messages.to_vec();
        if let Some(last) = messages.last_mut() {
            let content = last["content"].as_str().unwrap_or_default();
            let other = if content.trim_start().starts_with('0') { "1" } else { "0" };
            last["content"] = json!(other);
        }
        let other = self.render(&messages, false)?;
        let pairs = through.bytes().zip(other.bytes());
        let same = through.floor_char_boundary(pairs.take_while(|(a, b)| a == b).count());
        let from = through.floor_char_boundary(same.saturating_sub(OPENING_BYTES_MAX));
        let best = |alike: fn(&str, &str) -> usize| {
            let ends = (from..=same).filter(|end| through.is_char_boundary(*end));
            let best = ends.map(|end| (alike(before, &through[..end]), end)).max();
            best.filter(|(bytes, _)| *bytes >= MATCH_BYTES_MIN)
        };
        // Some templates end a request with a line more than they write before an answer.
        let border = best(same_end).or_else(|| best(|a, b| same_end(a.trim_end(), b.trim_end())));
        border.map(|(_, end)| end).ok_or_else(|| {
            let opens = "the chat template opens an answer in a request in another way than it \
                         shows one, so there is no telling what would be learnt; use `prompt` and \
                         `completion`";
            wrong(opens).into()
        })
    }

    fn render(&self, messages: &[Value], add_generation_prompt: bool) -> Result<String, Stop> {
        if (self.over)() {
            return Err(Stop::Over);
        }
        let Template { text, own, now, bytes_max } = self.template;
        let inputs = ChatInputs { messages, tools: self.tools, add_generation_prompt, now };
        let rendered = match own {
            None => text.render_within(&inputs, bytes_max),
            Some((sandbox, template)) => sandbox.render_within(template, &inputs, bytes_max),
        };
        Ok(rendered?)
    }
}

/// Bytes at the end that two texts share.
fn same_end(a: &str, b: &str) -> usize {
    let pairs = a.bytes().rev().zip(b.bytes().rev());
    pairs.take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(stops: &[&str], special: &[&str], answer: Value, tail: &str) -> Option<String> {
        let list = |marks: &[&str]| marks.iter().map(|m| m.to_string()).collect();
        let ends = Ends { stops: list(stops), special: list(special) };
        ends.after(&answer, tail).map(|end| tail[..end].to_owned())
    }

    #[test]
    fn an_answer_ends_behind_the_first_token_after_its_content() {
        let say = |content: &str| json!({"role": "assistant", "content": content});
        let of = |content, tail| after(&["<end>", "<stop>"], &["<mark>"], say(content), tail);
        assert_eq!(of("a", "a<end>\n").as_deref(), Some("a<end>"));
        assert_eq!(of("a", "a<end>\n<stop>").as_deref(), Some("a<end>"));
        assert_eq!(of("", "<end>\n<stop>").as_deref(), Some("<end>"));
        assert_eq!(of(" a<end>b ", " a<end>b<end>\n").as_deref(), Some(" a<end>b<end>"), "quoted");
        assert_eq!(of("end", "end<end>\n<stop>").as_deref(), Some("end<end>"));
        assert_eq!(of("a", "a<mark>\n").as_deref(), Some("a<mark>"), "no stop, but special");
        assert_eq!(of("a\nb", "A\nb<end>\n<stop>").as_deref(), Some("A\nb<end>"), "a last line");
        assert_eq!(of("a", "<end>A<end>\n").as_deref(), Some("<end>A<end>"), "rewritten");
        assert_eq!(of("a", "a\n"), None);
        let call = json!({"role": "assistant", "content": "a", "tool_calls": []});
        assert_eq!(after(&["<end>"], &[], call, "a<end>{}<end>\n").unwrap(), "a<end>{}<end>");
        assert_eq!(after(&["<e>", "<e>x"], &[], say("a"), "a<e>x").unwrap(), "a<e>x");
    }
}
