//! The parts of `docs/` that come from the code: routes and objects, error codes, settings.
//!
//! Owns their form. Never holds a fact: those are in the route table, the wire types, the table of
//! codes and the settings. The thing to know: such a part stands between two marks in its page, and
//! everything else of the page is written by hand.

use polylora::api::{ROUTES, Scope, document};
use polylora::config::{Config, Given, SETTINGS};
use polylora::error::codes::GROUPS;
use serde_json::Value;

const COLUMNS: usize = 118;

/// (page, name of the part, what it must say)
pub fn parts() -> Vec<(&'static str, &'static str, String)> {
    vec![
        ("docs/http-api.md", "routes", routes()),
        ("docs/errors.md", "codes", codes()),
        ("docs/configuration.md", "settings", settings()),
    ]
}

/// The page with the part replaced; `None` where its marks are missing.
pub fn with_part(page: &str, name: &str, part: &str) -> Option<String> {
    let (open, close) = (format!("<!-- {name}: made from the code -->\n"), "<!-- end -->");
    let start = page.find(&open)? + open.len();
    let end = start + page[start..].find(close)?;
    Some(format!("{}\n{part}\n{}", &page[..start], &page[end..]))
}

/// Text in lines of at most so many columns; those after the first are indented.
fn wrapped(first: &str, rest: &str, text: &str) -> String {
    let mut lines = vec![first.to_owned()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().expect("one at least");
        let empty = line.len() == first.len() || line.len() == rest.len();
        if !empty && line.chars().count() + 1 + word.chars().count() > COLUMNS {
            lines.push(format!("{rest}{word}"));
            continue;
        }
        if !empty {
            line.push(' ');
        }
        line.push_str(word);
    }
    lines.join("\n") + "\n"
}

fn item(text: &str) -> String {
    wrapped("- ", "  ", text)
}

/// The text as a sentence of its own.
fn sentence(text: &str) -> String {
    let text = text.trim();
    if text.is_empty() || text.ends_with(['.', '!', '?', ':']) {
        return text.to_owned();
    }
    format!("{text}.")
}

/// What follows a name: nothing but a full stop, or a sentence.
fn explained(about: &str) -> String {
    match about.is_empty() {
        true => ".".to_owned(),
        false => format!(": {}", sentence(about)),
    }
}

fn codes() -> String {
    let mut page = String::new();
    for group in GROUPS {
        page += &format!("## {}\n\n", group.title);
        for code in group.codes {
            let statuses: Vec<String> = code.statuses.iter().map(u16::to_string).collect();
            let statuses = match statuses.is_empty() {
                true => "no HTTP".to_owned(),
                false => statuses.join(", "),
            };
            page += &item(&format!("`{}` ({statuses}): {}", code.code, code.meaning));
        }
        page.push('\n');
    }
    page.trim_end().to_owned() + "\n"
}

fn settings() -> String {
    let defaults = Config::load(None, Given::default()).expect("the defaults are right");
    let mut page = String::new();
    for row in SETTINGS {
        let default = match row.told(&defaults) {
            _ if row.help().contains("default:") => String::new(),
            Some(told) if !matches!(told.as_str(), "[]" | "{}") => format!(" Default: `{told}`."),
            _ => " Default: none.".to_owned(),
        };
        let expected = row.expected().map_or(String::new(), |e| format!(" Expected: {e}."));
        let whole = format!("**`{}`**: {}{default}{expected}", row.key, sentence(row.help()));
        page += &item(&whole.replace(".0 ", " "));
        let flags = [row.flag()].into_iter().chain(row.aliases.iter().map(|a| (*a).to_owned()));
        let flags: Vec<String> = flags.map(|flag| format!("`--{flag}`")).collect();
        page += &wrapped("  ", "  ", &format!("{}, `{}`", flags.join(", "), row.env()));
    }
    page
}

fn who(scope: Scope) -> &'static str {
    match scope {
        Scope::Public => "everyone",
        Scope::AnyKey => "any key",
        Scope::Inference => "`inference`",
        Scope::Admin => "`admin`",
        Scope::Operator => "`admin`, operators only",
        Scope::Metrics => "`metrics`, operators only",
    }
}

/// A heading's address within its page, as GitHub makes it.
pub fn anchor(heading: &str) -> String {
    let kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
    let plain: String = heading.trim().to_lowercase().chars().filter(kept).collect();
    plain.replace(' ', "-")
}

fn routes() -> String {
    let document = serde_json::to_value(document()).expect("OpenAPI is JSON");
    let mut page = String::from("## Routes\n\n| Route | Scope of the key |\n|---|---|\n");
    let mut sections = String::new();
    for route in ROUTES {
        let path = route.path.replace("{*", "{");
        let title = format!("{} {path}", route.method.to_uppercase());
        page += &format!("| [`{title}`](#{}) | {} |\n", anchor(&title), who(route.scope));
        sections += &format!("### {title}\n\n");
        sections += &section(&document["paths"][&path][route.method]);
    }
    page += "\n## Each route\n\n";
    page += &sections;
    page += "## Objects\n\n";
    for (name, schema) in document["components"]["schemas"].as_object().expect("schemas") {
        page += &format!("### {name}\n\n{}\n", object(schema));
    }
    page.trim_end().to_owned() + "\n"
}

fn section(operation: &Value) -> String {
    let mut page = String::new();
    let Some(summary) = operation["summary"].as_str() else {
        return "Not described in the document itself: it is the document, or the page that \
                shows it.\n\n"
            .to_owned();
    };
    page += &wrapped("", "", summary);
    page.push('\n');
    if let Some(text) = operation["description"].as_str() {
        page += &wrapped("", "", text);
        page.push('\n');
    }
    for p in operation["parameters"].as_array().into_iter().flatten() {
        let (name, place) = (text(&p["name"]), text(&p["in"]));
        let about = explained(text(&p["description"]));
        page += &item(&format!("`{name}` ({place}, {}){about}", kind(&p["schema"])));
    }
    for (form, content) in operation["requestBody"]["content"].as_object().into_iter().flatten() {
        let about = match content["schema"]["$ref"].is_string() {
            true => kind(&content["schema"]),
            false => format!("`{form}`"),
        };
        page += &item(&format!("Body: {about}."));
    }
    for (status, answer) in operation["responses"].as_object().into_iter().flatten() {
        let schema = answer["content"].as_object().and_then(|c| c.values().next());
        let schema = schema.map_or(&Value::Null, |c| &c["schema"]);
        let mut about = sentence(text(&answer["description"]));
        if schema["$ref"].is_string() {
            let gap = if about.is_empty() { "" } else { " " };
            about += &format!("{gap}{}.", kind(schema));
        }
        let colon = if about.is_empty() { "." } else { ": " };
        page += &item(&format!("Answer {status}{colon}{about}"));
    }
    page + "\n"
}

/// What an object is for, and its fields.
fn object(schema: &Value) -> String {
    let mut page = String::new();
    let about = text(&schema["description"]);
    if !about.is_empty() {
        page += &wrapped("", "", &sentence(about));
        page.push('\n');
    }
    for part in schema["allOf"].as_array().into_iter().flatten() {
        match part["$ref"].is_string() {
            true => page += &item(&format!("All fields of {}.", kind(part))),
            false => page += &fields(part),
        }
    }
    for one in schema["oneOf"].as_array().into_iter().flatten() {
        match one["properties"].is_object() {
            true => page += &format!("\nOne form:\n\n{}", fields(one)),
            false => page += &item(&format!("Either {}.", kind(one))),
        }
    }
    page + &fields(schema)
}

fn fields(schema: &Value) -> String {
    let required: Vec<&str> =
        schema["required"].as_array().into_iter().flatten().map(text).collect();
    let mut page = String::new();
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let mut kind = kind(field);
        if !required.contains(&name.as_str()) {
            kind = format!("{}, optional", kind.replace(" or null", ""));
        }
        let of_one = field["oneOf"].as_array().into_iter().flatten();
        let about = of_one.map(|o| text(&o["description"])).find(|t| !t.is_empty());
        let mut about = about.unwrap_or(text(&field["description"])).to_owned();
        if let (true, Some(example)) = (about.is_empty(), field["example"].as_str()) {
            about = format!("such as `{example}`");
        }
        page += &item(&format!("`{name}` ({kind}){}", explained(&about)));
    }
    page
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// A schema in a few words.
fn kind(schema: &Value) -> String {
    if let Some(name) = schema["$ref"].as_str().and_then(|r| r.rsplit('/').next()) {
        return format!("[{name}](#{})", anchor(name));
    }
    if let Some(all) = schema["oneOf"].as_array() {
        return all.iter().map(kind).collect::<Vec<_>>().join(" or ");
    }
    if let Some(values) = schema["enum"].as_array() {
        let values: Vec<String> = values.iter().map(|v| format!("`{}`", text(v))).collect();
        return values.join(" or ");
    }
    let names: Vec<&str> = match &schema["type"] {
        Value::Array(all) => all.iter().map(text).collect(),
        one => vec![text(one)],
    };
    let one = |name: &&str| match *name {
        "array" => format!("list of {}", kind(&schema["items"])),
        "object" if schema["additionalProperties"].is_object() => {
            format!("map to {}", kind(&schema["additionalProperties"]))
        }
        "" => "any value".to_owned(),
        other => other.to_owned(),
    };
    names.iter().map(one).collect::<Vec<_>>().join(" or ")
}
