//! Text against what was not written here: token ids from Hugging Face, templates rendered by Jinja
//! in Python, the tokenizers library's own decode, and naive searches.

use polylora::checkpoint::source::{DEMO, locate};
use polylora::checkpoint::{Checkpoint, TextSource};
use polylora::error::{Error, Kind};
use polylora::text::Text;
use polylora::text::detokenizer::Detokenizer;
use polylora::text::stop::{StopStrings, Stopped};
use polylora::text::template::{ChatInputs, ChatTemplate};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokenizers::Tokenizer;

fn golden(name: &str) -> Value {
    let path = format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// The demo model's text, opened once.
fn demo() -> &'static Text {
    static TEXT: OnceLock<Text> = OnceLock::new();
    TEXT.get_or_init(|| {
        let path = locate(DEMO).unwrap().path;
        Text::new(Checkpoint::open(&path).unwrap().text).unwrap()
    })
}

/// A text around a tokenizer.json, without a template.
fn text_of(tokenizer: Value, bos: Option<u32>, add_bos: bool) -> Text {
    try_text_of(tokenizer, bos, add_bos).unwrap_or_else(|e| panic!("{e}"))
}

fn try_text_of(tokenizer: Value, bos: Option<u32>, add_bos: bool) -> Result<Text, Error> {
    Text::new(TextSource {
        tokenizer: tokenizer.to_string().parse().unwrap(),
        chat_template: None,
        bos,
        eos: vec![],
        add_bos,
    })
}

/// A SentencePiece-like vocabulary: 0 <unk>, 1 <s>, 2 </s>, 3..=258 the byte tokens, then pieces.
pub fn sentencepiece(decoder: Value) -> Value {
    let mut vocab = serde_json::Map::new();
    let mut add = |piece: String| {
        let id = vocab.len();
        vocab.insert(piece, id.into());
    };
    for special in ["<unk>", "<s>", "</s>"] {
        add(special.into());
    }
    for byte in 0..=255 {
        add(format!("<0x{byte:02X}>"));
    }
    for piece in ["▁", "▁Hello", "▁▁", "wor", "ld", "é", "東", "a", "!", "▁b▁"] {
        add(piece.into());
    }
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": decoder,
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>",
                  "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
                  "byte_fallback": true, "vocab": vocab, "merges": []}
    })
}

const VOCABULARY: u32 = 3 + 256 + 10;

pub fn llama2_decoder() -> Value {
    json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]})
}

fn gemma_decoder() -> Value {
    json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"}]})
}

fn metaspace_decoder(prepend: &str) -> Value {
    json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": prepend, "split": true})
}

fn stream(text: &Text, tokens: &[u32], skip_special: bool) -> String {
    let mut detokenizer = Detokenizer::new(text.clone(), skip_special);
    let mut whole: String = tokens.iter().map(|&t| detokenizer.push(t)).collect();
    whole.push_str(&detokenizer.finish());
    whole
}

fn library_decode(tokenizer: &Tokenizer, tokens: &[u32], skip_special: bool) -> String {
    tokenizer.decode(tokens, skip_special).unwrap()
}

#[test]
fn demo_prompts_have_the_ids_of_hugging_face() {
    let info = &golden("trained.json")["info"];
    for (prompt, ids) in
        info["prompts"].as_array().unwrap().iter().zip(info["prompt_ids"].as_array().unwrap())
    {
        let messages = [json!({"role": "user", "content": prompt})];
        assert_eq!(json!(demo().encode_chat(&messages, None, true).unwrap()), *ids);
    }
    let text = info["text"].as_str().unwrap();
    assert_eq!(json!(demo().encode(text, true).unwrap()), info["text_ids"]);
    let ids: Vec<u32> = serde_json::from_value(info["text_ids"].clone()).unwrap();
    assert_eq!(demo().decode(&ids, true).unwrap(), text);
}

#[test]
fn special_tokens_in_the_text_are_recognised_and_skipped_only_on_request() {
    let ids = demo().encode("<|im_start|>user", false).unwrap();
    assert_eq!(ids[0], 1);
    assert_eq!(demo().decode(&ids, true).unwrap(), "user");
    assert_eq!(demo().decode(&ids, false).unwrap(), "<|im_start|>user");
}

#[test]
fn bos_is_put_in_front_once_and_only_where_the_model_wants_it() {
    let plain = text_of(sentencepiece(llama2_decoder()), Some(1), true);
    assert_eq!(plain.encode("a", true).unwrap(), [1, 266]);
    assert_eq!(plain.encode("a", false).unwrap(), [266]);
    let unwanted = text_of(sentencepiece(llama2_decoder()), Some(1), false);
    assert_eq!(unwanted.encode("a", true).unwrap(), [266]);
    let mut adding = sentencepiece(llama2_decoder());
    adding["post_processor"] = json!({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}});
    let adding = text_of(adding, Some(1), true);
    assert_eq!(adding.encode("a", true).unwrap(), [1, 266]);
    assert_eq!(adding.encode("a", false).unwrap(), [266]);
}

#[test]
fn templates_render_as_jinja_in_python_does() {
    let golden = golden("templates.json");
    let token = |name: &str| golden[name].as_str().map(str::to_owned);
    let now = UNIX_EPOCH + Duration::from_secs(golden["now_unix"].as_u64().unwrap());
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() > 15);
    for case in cases {
        let template = case["template"].as_str().unwrap();
        let template = ChatTemplate::new(template, token("bos_token"), token("eos_token")).unwrap();
        let rendered = template.render(&ChatInputs {
            messages: case["messages"].as_array().unwrap(),
            tools: Some(&case["tools"]).filter(|tools| !tools.is_null()),
            add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap(),
            now,
        });
        match (rendered, case["refusal"].as_str()) {
            (Ok(text), None) => {
                assert_eq!(text, case["text"].as_str().unwrap(), "{}", case["name"])
            }
            (Err(e), Some(words)) => {
                assert_eq!((e.kind, e.code), (Kind::Invalid, "chat_template_error"));
                assert!(e.message.ends_with(&format!(": {words}")), "{}", e.message);
            }
            (rendered, _) => panic!("{}: {rendered:?}", case["name"]),
        }
    }
}

fn render(template: &str, messages: &[Value], tools: Option<&Value>) -> Result<String, Error> {
    ChatTemplate::new(template, None, None)?.render(&ChatInputs {
        messages,
        tools,
        add_generation_prompt: true,
        now: SystemTime::now(),
    })
}

#[test]
fn template_list_gives_the_default_and_the_one_for_tools() {
    let list =
        json!([{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"},
                      {"name": "rag", "template": "{{ broken"}])
        .to_string();
    let tools = json!([]);
    assert_eq!(render(&list, &[], None).unwrap(), "plain");
    assert_eq!(render(&list, &[], Some(&tools)).unwrap(), "tools");
    let one = json!([{"name": "default", "template": "plain"}]).to_string();
    assert_eq!(render(&one, &[], Some(&tools)).unwrap(), "plain");
    let none = json!([{"name": "rag", "template": "x"}]).to_string();
    assert_eq!(render(&none, &[], None).unwrap_err().code, "unsupported_chat_template");
    // Not a list, though it starts like one.
    assert_eq!(render("[INST]", &[], None).unwrap(), "[INST]");
}

#[test]
fn template_that_does_not_compile_is_refused_with_its_line() {
    let e = render("fine\n{% for x in %}", &[], None).unwrap_err();
    assert_eq!(e.code, "unsupported_chat_template");
    assert!(e.message.contains(":2"), "{}", e.message);
}

#[test]
fn template_cannot_run_for_ever_nor_write_without_end() {
    let spinning = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
    let e = render(spinning, &[], None).unwrap_err();
    assert!(e.message.contains("steps"), "{}", e.message);
    let writing = "{% for a in range(40) %}{{ 'x' * 1000000 }}{% endfor %}";
    let e = render(writing, &[], None).unwrap_err();
    assert_eq!(e.code, "chat_template_error");
    assert!(e.message.contains("bytes"), "{}", e.message);
    assert!(render("{% include 'x' %}", &[], None).is_err());
}

#[test]
fn content_part_that_is_not_text_is_refused_by_name() {
    let messages = [
        json!({"role": "user", "content": "hi"}),
        json!({"role": "user", "content": [{"type": "text", "text": "see"},
                                         {"type": "image_url", "image_url": {}}]}),
    ];
    for template in ["{{ messages[1].content }}", "{% for p in message.content %}{% endfor %}"] {
        let e = render(template, &messages, None).unwrap_err();
        assert_eq!((e.kind, e.code), (Kind::Invalid, "unsupported_content_part"));
        assert_eq!(e.param.as_deref(), Some("messages[1].content[1]"));
        assert!(e.message.contains("image_url"), "{}", e.message);
    }
}

#[test]
fn messages_without_a_template_are_refused() {
    let text = text_of(sentencepiece(llama2_decoder()), None, false);
    assert!(!text.has_template());
    assert_eq!(text.render(&[], None, true).unwrap_err().code, "no_chat_template");
}

#[test]
fn unknown_decoder_is_refused_by_name() {
    let decoder = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    let e = try_text_of(sentencepiece(decoder), None, false).err().unwrap();
    assert_eq!(e.code, "unsupported_tokenizer");
    assert!(e.message.contains("WordPiece"), "{}", e.message);
}

#[test]
fn only_whole_characters_leave_the_stream() {
    let sample = "naïve 🚲 東京 👩‍👩‍👧‍👦 done";
    let ids = demo().encode(sample, false).unwrap();
    let mut detokenizer = Detokenizer::new(demo().clone(), true);
    let mut whole = String::new();
    let mut empty = 0;
    for &id in &ids {
        let piece = detokenizer.push(id);
        assert!(!piece.contains('\u{FFFD}'));
        empty += usize::from(piece.is_empty());
        whole += &piece;
    }
    assert!(empty > 3, "characters were meant to be split over tokens");
    assert_eq!(whole + &detokenizer.finish(), sample);
}

#[test]
fn leading_space_is_dropped_from_an_answer_and_kept_in_a_continuation() {
    let text = text_of(sentencepiece(llama2_decoder()), Some(1), true);
    let hello = 260;
    assert_eq!(stream(&text, &[1, hello, hello], true), "Hello Hello");
    let mut continuing = Detokenizer::continuing(text.clone(), true, &[1, 266]);
    assert_eq!(continuing.push(hello), " Hello");
    // After nothing but special tokens the text starts here.
    let mut starting = Detokenizer::continuing(text.clone(), true, &[1]);
    assert_eq!(starting.push(hello), "Hello");
    // Also where the prompt's last tokens have no text.
    let mut continuing = Detokenizer::continuing(text.clone(), true, &[266, 2, 2, 2, 2]);
    assert_eq!(continuing.push(hello), " Hello");
    // The prompt ends within a character: é is C3 A9.
    let mut completing = Detokenizer::continuing(text.clone(), true, &[266, 3 + 0xC3]);
    assert_eq!(completing.push(3 + 0xA9), "é");
    assert_eq!(text.token_text(hello), (" Hello".into(), b" Hello".to_vec()));
    assert_eq!(text.token_text(3 + 0xC3), ("\u{FFFD}".into(), vec![0xC3]));
    assert_eq!(text.token_text(2), ("</s>".into(), b"</s>".to_vec()));
    assert_eq!(text.token_text(99_999), (String::new(), vec![]));
}

#[test]
fn token_bytes_of_the_demo_concatenate_to_the_text() {
    let sample = "Grüße 🚲\n\t<|im_end|> 東";
    let ids = demo().encode(sample, false).unwrap();
    let bytes: Vec<u8> = ids.iter().flat_map(|&id| demo().token_text(id).1).collect();
    assert_eq!(String::from_utf8(bytes).unwrap(), sample);
}

#[test]
fn endless_broken_bytes_leave_at_once() {
    let text = text_of(sentencepiece(llama2_decoder()), None, false);
    let mut detokenizer = Detokenizer::new(text, true);
    let mut shown = 0;
    for i in 0..10_000 {
        shown += detokenizer.push(3 + 0x80).chars().count();
        assert_eq!(shown, i + 1);
    }
}

/// Whether a run of byte tokens holds whole characters and broken ones: the one case that differs
/// from the library.
fn mixes(tokens: &[u32]) -> bool {
    let is_byte = |t: &u32| (3..259).contains(t);
    tokens.chunk_by(|a, b| is_byte(a) == is_byte(b)).filter(|run| is_byte(&run[0])).any(|run| {
        let bytes: Vec<u8> = run.iter().map(|&t| (t - 3) as u8).collect();
        std::str::from_utf8(&bytes).is_err()
            && bytes.utf8_chunks().any(|chunk| !chunk.valid().is_empty())
    })
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 400, failure_persistence: None, ..ProptestConfig::default()
    })]

    #[test]
    fn stream_of_any_ids_equals_the_whole_decode(
        tokens in prop::collection::vec(0u32..49_160, 0..40), skip in any::<bool>(),
    ) {
        let expected = library_decode(&demo().tokenizer, &tokens, skip);
        prop_assert_eq!(stream(demo(), &tokens, skip), &expected[..]);
        prop_assert_eq!(demo().decode(&tokens, skip).unwrap(), expected);
    }

    #[test]
    fn stream_of_any_text_gives_it_back(sample in "(\\PC|🚲|東京|\n| |é){0,30}") {
        let ids = demo().encode(&sample, false).unwrap();
        prop_assert_eq!(stream(demo(), &ids, false), sample);
    }

    #[test]
    fn sentencepiece_streams_equal_the_whole_decode(
        tokens in prop::collection::vec(
            prop_oneof![
                0u32..VOCABULARY, 259..VOCABULARY, Just(3 + 0xE6), Just(3 + 0x9D), Just(3 + 0xB1)
            ], 0..24),
        skip in any::<bool>(), which in 0usize..4,
    ) {
        let decoder = [
            llama2_decoder(), gemma_decoder(),
            metaspace_decoder("always"), metaspace_decoder("never"),
        ];
        let bytes_fall_back = which < 2;
        let text = text_of(sentencepiece(decoder[which].clone()), Some(1), true);
        let kept: Vec<u32> = tokens.iter().copied().filter(|&t| !skip || t > 2).collect();
        let expected = match bytes_fall_back && mixes(&kept) {
            true => text.decode(&tokens, skip).unwrap(),
            false => library_decode(&text.tokenizer, &tokens, skip),
        };
        prop_assert_eq!(stream(&text, &tokens, skip), expected);
    }

    #[test]
    fn words_without_a_decoder_are_joined_by_spaces(
        tokens in prop::collection::vec(259u32..VOCABULARY, 0..9),
    ) {
        let text = text_of(sentencepiece(Value::Null), None, false);
        let expected = library_decode(&text.tokenizer, &tokens, true);
        prop_assert_eq!(stream(&text, &tokens, true), expected);
    }

    #[test]
    fn stops_match_where_a_naive_search_of_the_whole_text_does(
        text in "[aé]{0,30}", stops in prop::collection::vec("[aé]{2,7}", 0..4),
        include in any::<bool>(), cuts in prop::collection::vec(1usize..9, 30),
    ) {
        let (shown, stop) = run_stops(&stops, include, &text, &cuts);
        prop_assert_eq!((shown, stop), naive_stops(&stops, include, &text));
    }

    #[test]
    fn only_what_may_start_a_stop_is_held_back(
        text in "[abc]{0,20}", stops in prop::collection::vec("[abc]{2,5}", 1..4),
    ) {
        let mut watch = StopStrings::new(stops.clone(), false);
        let Stopped::No(shown) = watch.push(&text) else { return Ok(()) };
        let held = &text[shown.len()..];
        let starts = |end: &str| stops.iter().any(|stop| stop.starts_with(end));
        prop_assert!(held.is_empty() || starts(held));
        for at in 0..shown.len() {
            prop_assert!(!starts(&text[at..]), "{} should have been held", &text[at..]);
        }
    }
}

/// Everything shown and the stop that matched, pushing `cuts` characters at a time.
fn run_stops(
    stops: &[String],
    include: bool,
    text: &str,
    cuts: &[usize],
) -> (String, Option<String>) {
    let mut watch = StopStrings::new(stops.to_vec(), include);
    let mut chars = text.chars().peekable();
    let mut shown = String::new();
    let mut cuts = cuts.iter().cycle();
    while chars.peek().is_some() {
        let piece: String = chars.by_ref().take(*cuts.next().unwrap()).collect();
        match watch.push(&piece) {
            Stopped::No(text) => shown += &text,
            Stopped::Yes { text, stop } => return (shown + &text, Some(stop)),
        }
    }
    (shown + &watch.finish(), None)
}

/// At the first character where any stop string is complete, the longest one that is.
fn naive_stops(stops: &[String], include: bool, text: &str) -> (String, Option<String>) {
    let ends = text.char_indices().map(|(i, c)| i + c.len_utf8());
    for end in ends {
        let complete = stops.iter().filter(|stop| text[..end].ends_with(&***stop));
        if let Some(stop) = complete.max_by_key(|stop| stop.len()) {
            let shown = if include { end } else { end - stop.len() };
            return (text[..shown].into(), Some(stop.clone()));
        }
    }
    (text.into(), None)
}

#[test]
fn stop_that_is_complete_first_wins_over_one_that_begins_first() {
    for cuts in [1, 2, 9] {
        let stops = ["abcdef".to_owned(), "cd".to_owned(), "bcd".to_owned()];
        let (shown, stop) = run_stops(&stops, false, "xabcdefg", &[cuts]);
        assert_eq!((shown.as_str(), stop.as_deref()), ("xa", Some("bcd")));
    }
}

#[test]
fn text_after_a_stop_is_dropped() {
    let mut watch = StopStrings::new(vec!["END".into(), String::new()], false);
    assert_eq!(watch.push("one E"), Stopped::No("one ".into()));
    let end = Stopped::Yes { text: String::new(), stop: "END".into() };
    assert_eq!(watch.push("ND two"), end);
    assert_eq!(watch.push("three"), Stopped::No(String::new()));
    assert_eq!(watch.finish(), "");
}
