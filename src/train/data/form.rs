//! One line's JSON: which format it is, and its fields checked.
//!
//! Owns the names of the fields. Never renders or encodes. The thing to know: what is not known is
//! refused by name, so that a misspelt field is never silently without effect.

use crate::error::{Error, Result, brief};
use crate::text::messages::{self, kind, wrong_type};
use serde_json::{Map, Value};

/// Messages of one chat: as many as a request may bring.
const MESSAGES_MAX: usize = 1024;

/// What a file is for. A file holds one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Chats, and prompts with their completions.
    Supervised,
    /// Pairs of answers: example 2·i is the preferred one, 2·i + 1 the other.
    Preference,
}

impl Kind {
    /// Examples that a line's entry is: 2 where they are pairs.
    pub fn group(self) -> usize {
        match self {
            Self::Supervised => 1,
            Self::Preference => 2,
        }
    }

    /// One line, in words.
    pub fn words(self) -> &'static str {
        match self {
            Self::Supervised => "a supervised example",
            Self::Preference => "a preference",
        }
    }
}

/// What a line holds.
#[derive(Debug)]
pub enum Record {
    Chat(Chat),
    Completion { prompt: String, completion: String },
    Pair(Pair),
}

/// A conversation that ends with an answer.
#[derive(Debug)]
pub struct Chat {
    /// As templates read them.
    pub messages: Vec<Value>,
    /// Which of them are answers to be learnt, ascending.
    pub supervised: Vec<usize>,
    pub tools: Option<Value>,
}

/// A conversation and two answers to it.
#[derive(Debug)]
pub struct Pair {
    pub messages: Vec<Value>,
    pub tools: Option<Value>,
    pub preferred: Value,
    pub other: Value,
}

impl Record {
    pub fn kind(&self) -> Kind {
        match self {
            Self::Chat(_) | Self::Completion { .. } => Kind::Supervised,
            Self::Pair(_) => Kind::Preference,
        }
    }

    /// Reads a line. Errors name the field.
    pub fn read(line: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(line).map_err(|e| wrong(not_json(&e)))?;
        let Value::Object(fields) = value else {
            return Err(wrong(format!("a line must be an object, not {}", kind(&value))));
        };
        let has = |name: &str| fields.contains_key(name);
        if has("messages") {
            return chat(Fields { path: "", fields });
        }
        if has("input") || has("preferred_output") || has("non_preferred_output") {
            return pair(Fields { path: "", fields });
        }
        if has("prompt") || has("completion") {
            return completion(Fields { path: "", fields });
        }
        Err(wrong(
            "there is none of `messages` (a chat), `prompt` and `completion` (a text), or `input`, \
             `preferred_output` and `non_preferred_output` (a preference)",
        ))
    }
}

fn chat(mut fields: Fields) -> Result<Record> {
    let mut list = fields.list("messages")?;
    let tools = fields.tools()?;
    fields.end()?;
    let mut supervised = Vec::new();
    for (i, message) in list.iter_mut().enumerate() {
        let answers = message["role"] == "assistant";
        let weight = message.as_object_mut().and_then(|fields| fields.remove("weight"));
        let place = format!("messages[{i}].weight");
        let weight = match weight {
            None | Some(Value::Null) => 1.0,
            Some(_) if !answers => {
                return Err(wrong(format!("`{place}`: only assistant messages have a weight")));
            }
            Some(Value::Number(weight)) => weight.as_f64().unwrap_or(f64::NAN),
            Some(other) => return Err(wrong_type(&place, "0 or 1", &other)),
        };
        if weight != 0.0 && weight != 1.0 {
            return Err(wrong(format!("`{place}` must be 0 or 1")));
        }
        if answers && weight == 1.0 {
            supervised.push(i);
        }
    }
    let messages = messages::check("messages", list, MESSAGES_MAX)?;
    if !messages.iter().any(answers) {
        return Err(wrong("`messages` has no assistant message, so there is nothing to learn"));
    }
    if !messages.last().is_some_and(answers) {
        return Err(wrong("`messages` must end with an assistant message"));
    }
    if supervised.first() == Some(&0) {
        return Err(wrong(
            "`messages[0]` is an assistant message, which nothing asks for; give it `weight: 0` or \
             a message before it",
        ));
    }
    Ok(Record::Chat(Chat { messages, supervised, tools }))
}

fn pair(mut fields: Fields) -> Result<Record> {
    let input = match fields.take("input")? {
        Value::Object(input) => input,
        other => return Err(wrong_type("input", "an object", &other)),
    };
    let mut input = Fields { path: "input.", fields: input };
    let list = input.list("messages")?;
    let tools = input.tools()?;
    input.end()?;
    let messages = messages::check("input.messages", list, MESSAGES_MAX)?;
    if messages.last().is_some_and(answers) {
        return Err(wrong(
            "`input.messages` must not end with an assistant message: the outputs answer it",
        ));
    }
    let mut output = |name: &str| {
        let list = fields.list(name)?;
        let mut list = messages::check(name, list, MESSAGES_MAX)?;
        match list.pop() {
            Some(message) if list.is_empty() && answers(&message) => Ok(message),
            _ => Err(wrong(format!("`{name}` must be a list of one assistant message"))),
        }
    };
    let (preferred, other) = (output("preferred_output")?, output("non_preferred_output")?);
    fields.end()?;
    if preferred == other {
        return Err(wrong("`preferred_output` and `non_preferred_output` are the same"));
    }
    Ok(Record::Pair(Pair { messages, tools, preferred, other }))
}

fn completion(mut fields: Fields) -> Result<Record> {
    let (prompt, completion) = (fields.text("prompt")?, fields.text("completion")?);
    fields.end()?;
    if completion.is_empty() {
        return Err(wrong("`completion` is empty, so there is nothing to learn"));
    }
    Ok(Record::Completion { prompt, completion })
}

fn answers(message: &Value) -> bool {
    message["role"] == "assistant"
}

/// Fields not read yet of the object under `path`.
struct Fields {
    path: &'static str,
    fields: Map<String, Value>,
}

impl Fields {
    fn take(&mut self, name: &str) -> Result<Value> {
        let missing = || wrong(format!("`{}{name}` is required", self.path));
        self.fields.shift_remove(name).ok_or_else(missing)
    }

    fn list(&mut self, name: &str) -> Result<Vec<Value>> {
        match self.take(name)? {
            Value::Array(list) => Ok(list),
            other => Err(wrong_type(&format!("{}{name}", self.path), "a list", &other)),
        }
    }

    fn text(&mut self, name: &str) -> Result<String> {
        match self.take(name)? {
            Value::String(text) => Ok(text),
            other => Err(wrong_type(&format!("{}{name}", self.path), "a string", &other)),
        }
    }

    /// Functions for the template, as requests bring them.
    fn tools(&mut self) -> Result<Option<Value>> {
        let path = self.path;
        let mut taken = |name: &str| self.fields.shift_remove(name).filter(|v| !v.is_null());
        match taken("parallel_tool_calls") {
            // No template reads it, so it changes nothing, as in a request.
            None | Some(Value::Bool(_)) => {}
            Some(other) => {
                let place = format!("{path}parallel_tool_calls");
                return Err(wrong_type(&place, "a boolean", &other));
            }
        }
        if taken("functions").is_some() {
            let message = format!("`{path}functions` is not supported; send them as `tools`");
            return Err(wrong(message));
        }
        match taken("tools") {
            None => Ok(None),
            Some(Value::Array(list)) => messages::tools(Some(list), None),
            Some(other) => Err(wrong_type(&format!("{path}tools"), "a list", &other)),
        }
    }

    /// Refuses what was not read.
    fn end(&self) -> Result<()> {
        match self.fields.keys().next() {
            None => Ok(()),
            Some(name) => Err(wrong(format!("unknown field `{}{}`", self.path, brief(name)))),
        }
    }
}

/// The parser's words without its line, which is always the first.
fn not_json(error: &serde_json::Error) -> String {
    let words = error.to_string();
    let what = words.split(" at line ").next().unwrap_or_default();
    format!("this is not JSON: {what} at column {}", error.column())
}

/// A line breaks a rule.
pub fn wrong(message: impl Into<String>) -> Error {
    Error::invalid("invalid_training_file", message)
}
