//! Messages of a chat: checked, and brought to the form that chat templates read.
//!
//! Owns roles, content parts and the fields of a message, for requests and for training examples.
//! Never renders. The thing to know: templates want text content as one string and tool arguments
//! as an object, clients send parts and JSON in a string; the change is made here.

use crate::error::{Error, Result, brief};
use serde_json::{Map, Value};

/// Fields of a message that a template may read.
const FIELDS: &[&str] =
    &["role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"];

/// Fields of an answer that clients send back; they are not part of the conversation.
const ECHOED: &[&str] = &["annotations", "id", "object", "refusal", "status"];

/// Checks the list under `path`, of at most `most` messages, and returns it as templates read it.
/// Errors: `invalid_value`, `invalid_type`, `missing_parameter`, `unknown_parameter`,
/// `unsupported_content`.
pub fn check(path: &str, messages: Vec<Value>, most: usize) -> Result<Vec<Value>> {
    if messages.is_empty() {
        return Err(invalid_value(path, format!("`{path}` must not be empty")));
    }
    if messages.len() > most {
        let message = format!("`{path}` has {} entries; at most {most}", messages.len());
        return Err(invalid_value(path, message));
    }
    messages.into_iter().enumerate().map(|(i, m)| message(&format!("{path}[{i}]"), m)).collect()
}

fn message(path: &str, value: Value) -> Result<Value> {
    let Value::Object(mut message) = value else {
        return Err(wrong_type(path, "an object", &value));
    };
    message.retain(|name, value| !value.is_null() && !ECHOED.contains(&name.as_str()));
    if let Some(name) = message.keys().find(|n| !FIELDS.contains(&n.as_str())) {
        let shown = brief(name);
        return Err(Error::invalid(
            "unknown_parameter",
            format!("`{path}` has an unknown field `{shown}`"),
        )
        .param(format!("{path}.{shown}")));
    }
    let role = role(path, &message)?;
    let content = match message.remove("content") {
        Some(content) => Some(text(&format!("{path}.content"), content)?),
        None => None,
    };
    if content.is_none() && !(role == "assistant" && message.contains_key("tool_calls")) {
        let place = format!("{path}.content");
        return Err(missing(&place));
    }
    let mut out = Map::new();
    out.insert("role".into(), role.into());
    out.insert("content".into(), content.unwrap_or_default().into());
    for (name, value) in message {
        match name.as_str() {
            "role" => {}
            "tool_calls" => {
                out.insert(name, tool_calls(&format!("{path}.tool_calls"), value)?);
            }
            _ if value.is_string() => {
                out.insert(name, value);
            }
            _ => return Err(wrong_type(&format!("{path}.{name}"), "a string", &value)),
        }
    }
    Ok(Value::Object(out))
}

fn role(path: &str, message: &Map<String, Value>) -> Result<&'static str> {
    let place = format!("{path}.role");
    match message.get("role") {
        None => Err(missing(&place)),
        Some(Value::String(role)) => match role.as_str() {
            // Templates older than the word know it as `system`.
            "system" | "developer" => Ok("system"),
            "user" => Ok("user"),
            "assistant" => Ok("assistant"),
            "tool" => Ok("tool"),
            _ => Err(invalid_value(
                &place,
                format!("`{place}` must be system, developer, user, assistant or tool"),
            )),
        },
        Some(other) => Err(wrong_type(&place, "a string", other)),
    }
}

/// The text of a string or of text parts, parts on lines of their own.
fn text(path: &str, content: Value) -> Result<String> {
    let parts = match content {
        Value::String(text) => return Ok(text),
        Value::Array(parts) => parts,
        other => return Err(wrong_type(path, "a string or a list of text parts", &other)),
    };
    let mut texts = Vec::with_capacity(parts.len());
    for (i, part) in parts.iter().enumerate() {
        let place = format!("{path}[{i}]");
        match (part["type"].as_str(), part["text"].as_str()) {
            (Some("text"), Some(text)) => texts.push(text),
            (Some("text"), None) => {
                return Err(missing(&format!("{place}.text")));
            }
            _ => {
                return Err(Error::invalid(
                    "unsupported_content",
                    format!("`{place}` is not a text part; only text is supported"),
                )
                .param(format!("{place}.type")));
            }
        }
    }
    Ok(texts.join("\n"))
}

/// Calls with their arguments as objects where they parse, as templates expect them.
fn tool_calls(path: &str, mut calls: Value) -> Result<Value> {
    let Value::Array(list) = &mut calls else {
        return Err(wrong_type(path, "a list", &calls));
    };
    for call in list {
        let Some(arguments) = call.pointer_mut("/function/arguments") else {
            continue;
        };
        let parsed = arguments.as_str().and_then(|s| serde_json::from_str(s).ok());
        if let Some(object @ Value::Object(_)) = parsed {
            *arguments = object;
        }
    }
    Ok(calls)
}

/// Tools for the template: only functions.
pub fn tools(tools: Option<Vec<Value>>, choice: Option<&Value>) -> Result<Option<Value>> {
    let tools = tools.unwrap_or_default();
    for (i, tool) in tools.iter().enumerate() {
        if tool["type"] != "function" || !tool["function"]["name"].is_string() {
            let place = format!("tools[{i}]");
            return Err(invalid_value(&place, format!("`{place}` must be a function with a name")));
        }
    }
    match choice.map(|c| c.as_str()) {
        Some(Some("none")) => Ok(None),
        None | Some(Some("auto")) => Ok((!tools.is_empty()).then_some(Value::Array(tools))),
        _ => Err(Error::invalid(
            "unsupported_parameter",
            "`tool_choice` must be `auto` or `none`: calls cannot be enforced",
        )
        .param("tool_choice")),
    }
}

fn invalid_value(path: &str, message: impl Into<String>) -> Error {
    Error::invalid("invalid_value", message).param(path)
}

fn missing(path: &str) -> Error {
    Error::invalid("missing_parameter", format!("`{path}` is required")).param(path)
}

/// What a JSON value is, in words.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A value has another JSON type than the field under `path` takes.
pub fn wrong_type(path: &str, expected: &str, got: &Value) -> Error {
    Error::invalid("invalid_type", format!("`{path}` must be {expected}, not {}", kind(got)))
        .param(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn blame(messages: Value) -> String {
        let e = check("messages", messages.as_array().unwrap().clone(), 3).unwrap_err();
        format!("{} {}", e.code, e.param.unwrap())
    }

    #[test]
    fn a_bad_message_is_blamed_by_its_path() {
        let user = json!({"role": "user", "content": "hi"});
        assert_eq!(blame(json!([])), "invalid_value messages");
        assert_eq!(blame(json!([user, 5])), "invalid_type messages[1]");
        assert_eq!(blame(json!([user, {"role": "user"}])), "missing_parameter messages[1].content");
        assert_eq!(
            blame(json!([user, {"role": "user", "content": 5}])),
            "invalid_type messages[1].content"
        );
        assert_eq!(
            blame(json!([{"role": "king", "content": "hi"}])),
            "invalid_value messages[0].role"
        );
        assert_eq!(
            blame(json!([{"role": "user", "content": [{"type": "image_url"}]}])),
            "unsupported_content messages[0].content[0].type"
        );
        assert_eq!(
            blame(json!([{"role": "user", "content": "", "colour": 1}])),
            "unknown_parameter messages[0].colour"
        );
        assert_eq!(blame(json!(vec![user; 4])), "invalid_value messages");
    }

    #[test]
    fn parts_become_one_text_and_an_answer_may_come_back_whole() {
        let messages = vec![
            json!({"role": "developer", "content": [
                    {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}),
            json!({"role": "assistant", "content": null, "refusal": null, "audio": null,
                    "tool_calls": [{"id": "1", "type": "function",
                        "function": {"name": "f", "arguments": "{\"x\":1}"}}]}),
        ];
        let checked = check("messages", messages, 2).unwrap();
        assert_eq!(checked[0], json!({"role": "system", "content": "a\nb"}));
        assert_eq!(checked[1]["tool_calls"][0]["function"]["arguments"], json!({"x": 1}));
    }

    #[test]
    fn a_forced_tool_call_is_refused() {
        let list = vec![json!({"type": "function", "function": {"name": "f"}})];
        assert!(tools(Some(list.clone()), Some(&json!("required"))).is_err());
        assert!(tools(Some(list.clone()), Some(&json!({"type": "function"}))).is_err());
        assert_eq!(tools(Some(list.clone()), Some(&json!("none"))).unwrap(), None);
        assert!(tools(Some(list), None).unwrap().is_some());
    }
}
