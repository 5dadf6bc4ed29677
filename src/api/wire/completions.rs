//! `POST /v1/completions`: body, answer and chunks.

use super::{SamplingFields, Usage};
use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use utoipa::ToSchema;

/// What only plain completions take.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct CompletionFields {
    /// A text, token ids, or a list of either.
    pub prompt: Prompt,
    /// Alternatives per token, 0 to 20; the sampled token is always among them.
    pub logprobs: Option<i64>,
    /// Put the prompt in front of the answer; with `logprobs` its tokens are scored too. Default
    /// false.
    pub echo: Option<bool>,
}

/// One prompt or several, as text or as tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    TokenLists(Vec<Vec<u32>>),
}

const PROMPT_EXPECTED: &str =
    "expected a string, a list of strings, a list of token ids or a list of such lists";
/// Prompts of one request.
const PROMPTS_MAX: usize = 128;

/// By hand, so that a list of a million ids is read into four bytes each and nothing else.
impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: Deserializer<'de>>(reader: D) -> Result<Self, D::Error> {
        let wrong = || D::Error::custom(PROMPT_EXPECTED);
        match reader.deserialize_any(Either { deep: true })? {
            Item::Text(text) => Ok(Self::Text(text)),
            Item::List(list) => list.ok_or_else(wrong),
            Item::Id(_) | Item::Wrong => Err(wrong()),
        }
    }
}

/// A part of a prompt, or what cannot be one.
enum Item {
    Text(String),
    Id(u32),
    /// A list, if all of it is alike.
    List(Option<Prompt>),
    Wrong,
}

/// Reads an item and never fails but for syntax; lists within lists hold ids only.
struct Either {
    deep: bool,
}

impl<'de> DeserializeSeed<'de> for Either {
    type Value = Item;

    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<Item, D::Error> {
        reader.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Either {
    type Value = Item;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(PROMPT_EXPECTED)
    }

    fn visit_str<E>(self, text: &str) -> Result<Item, E> {
        Ok(Item::Text(text.to_owned()))
    }

    fn visit_u64<E>(self, id: u64) -> Result<Item, E> {
        Ok(u32::try_from(id).map_or(Item::Wrong, Item::Id))
    }

    fn visit_i64<E>(self, _: i64) -> Result<Item, E> {
        Ok(Item::Wrong)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Item, E> {
        Ok(Item::Wrong)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Item, E> {
        Ok(Item::Wrong)
    }

    fn visit_unit<E>(self) -> Result<Item, E> {
        Ok(Item::Wrong)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Item, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Item::Wrong)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Item, A::Error> {
        let mut list = Prompt::Texts(Vec::new());
        let mut alike = true;
        while let Some(item) = seq.next_element_seed(Either { deep: false })? {
            alike = alike && (self.deep || matches!(item, Item::Id(_)));
            alike = alike && list.add(item);
        }
        // Nothing can be ids as well as texts.
        if !self.deep && list == Prompt::Texts(Vec::new()) {
            list = Prompt::Tokens(Vec::new());
        }
        Ok(Item::List(alike.then_some(list)))
    }
}

impl Prompt {
    /// Adds one more of the same kind, the first of which says what the kind is.
    fn add(&mut self, item: Item) -> bool {
        if *self == Self::Texts(Vec::new()) {
            match item {
                Item::Id(_) => *self = Self::Tokens(Vec::new()),
                Item::List(_) => *self = Self::TokenLists(Vec::new()),
                _ => {}
            }
        }
        match (self, item) {
            (Self::Texts(texts), Item::Text(text)) => {
                texts.push(text);
                texts.len() <= PROMPTS_MAX
            }
            (Self::Tokens(ids), Item::Id(id)) => {
                ids.push(id);
                true
            }
            (Self::TokenLists(lists), Item::List(Some(Self::Tokens(ids)))) => {
                lists.push(ids);
                lists.len() <= PROMPTS_MAX
            }
            _ => false,
        }
    }
}

/// Body of a plain completion.
#[derive(ToSchema)]
pub struct CompletionRequest {
    #[serde(flatten)]
    pub shared: SamplingFields,
    #[serde(flatten)]
    pub own: CompletionFields,
}

/// The answer; also each event of a stream.
#[derive(Serialize, ToSchema)]
pub struct Completion {
    pub id: String,
    #[schema(example = "text_completion")]
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    pub system_fingerprint: String,
    pub choices: Vec<CompletionChoice>,
    /// In a stream only with `include_usage`: null in all events but the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    pub usage: Option<Option<Usage>>,
}

#[derive(Serialize, ToSchema)]
pub struct CompletionChoice {
    pub index: usize,
    pub text: String,
    pub logprobs: Option<CompletionLogprobs>,
    /// `stop` or `length`; null before the end of a stream.
    pub finish_reason: Option<&'static str>,
}

/// Four lists of one length.
#[derive(Default, Serialize, ToSchema)]
pub struct CompletionLogprobs {
    pub tokens: Vec<String>,
    /// Null for the first token of an echoed prompt.
    pub token_logprobs: Vec<Option<f32>>,
    /// The most probable tokens at each position, with their log-probabilities.
    #[schema(value_type = Vec<Option<Object>>)]
    pub top_logprobs: Vec<Option<Alternatives>>,
    /// Characters of `text` before the token.
    pub text_offset: Vec<usize>,
}

/// Log probabilities by token, likeliest first: an object, its numbers written as those of
/// `token_logprobs` are.
pub struct Alternatives(pub Vec<(String, f32)>);

impl Serialize for Alternatives {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(token, logprob)| (token, logprob)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_is_one_of_four_things_and_nothing_else() {
        let read = |json: &str| serde_json::from_str::<Prompt>(json);
        let texts = |texts: &[&str]| Prompt::Texts(texts.iter().map(|t| t.to_string()).collect());
        assert_eq!(read("\"a\"").unwrap(), Prompt::Text("a".into()));
        assert_eq!(read("[]").unwrap(), texts(&[]));
        assert_eq!(read("[\"a\", \"\"]").unwrap(), texts(&["a", ""]));
        assert_eq!(read("[1, 4294967295]").unwrap(), Prompt::Tokens(vec![1, u32::MAX]));
        assert_eq!(read("[[1], []]").unwrap(), Prompt::TokenLists(vec![vec![1], vec![]]));
        for wrong in [
            "5",
            "null",
            "true",
            "{}",
            "{\"a\": [1]}",
            "[1, \"a\"]",
            "[\"a\", 1]",
            "[-1]",
            "[1.5]",
            "[4294967296]",
            "[[\"a\"]]",
            "[[[1]]]",
            "[[1], 1]",
            "[1, [1]]",
            "[null]",
            "[{}]",
            "[[1], \"a\"]",
            "[[], {}]",
        ] {
            let e = read(wrong).expect_err(wrong).to_string();
            assert!(e.starts_with(PROMPT_EXPECTED), "{wrong}: {e}");
        }
    }
}
