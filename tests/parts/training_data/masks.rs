//! What is learnt of an example, with templates of several families.

use super::*;
use crate::text::{llama2_decoder, sentencepiece};
use polylora::text::template::ChatInputs;
use proptest::prelude::*;
use support::golden;

/// A family's template as other tests have it.
fn stock(name: &str) -> String {
    let golden = golden("templates.json");
    let cases = golden["cases"].as_array().unwrap();
    let case = cases.iter().find(|case| case["name"] == name).unwrap();
    case["template"].as_str().unwrap().to_owned()
}

/// Writes the end of a text after the last answer only, as Phi-3 does.
const END_AT_LAST: &str = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' \
    }}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ \
    eos_token }}{% endif %}";
/// Writes an empty thought before the last answer only, as Qwen3 does.
const THOUGHT_AT_LAST: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if \
    m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ \
    m.content + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ \
    '<|im_start|>assistant\\n' }}{% endif %}";
/// Opens an answer in a request as it never shows one.
const OPENS_OTHERWISE: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + \
    m.content + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ \
    '<|im_start|>assistant\\n<think>\\n' }}{% endif %}";

/// (text, end of an answer, what stands before its content, system messages are known)
type Family = (Text, &'static str, &'static str, bool);

fn families() -> Vec<Family> {
    let chatml = ["<|im_end|>"];
    vec![
        (Text::new(source()).unwrap(), "<|im_end|>", "", true),
        (text_of(&stock("chatml"), None, &chatml), "<|im_end|>", "", true),
        (text_of(&stock("qwen"), None, &chatml), "<|im_end|>", "", true),
        (text_of(&stock("llama 3"), Some("<s>"), &["<|eot_id|>"]), "<|eot_id|>", "", true),
        (text_of(&stock("mistral"), Some("<s>"), &["</s>"]), "</s>", " ", true),
        (text_of(&stock("gemma"), Some("<s>"), &["<|eot_id|>"]), "<end_of_turn>", "", false),
        (text_of(END_AT_LAST, None, &["<|endoftext|>", "<|end|>"]), "<|end|>", "", true),
        (text_of(THOUGHT_AT_LAST, None, &chatml), "<|im_end|>", "<think>\n\n</think>\n\n", true),
    ]
}

fn rendered(text: &Text, messages: &[Value], prompt: bool) -> String {
    let now = reading(text).now;
    let inputs = ChatInputs { messages, tools: None, add_generation_prompt: prompt, now };
    text.render_within(&inputs, usize::MAX).unwrap()
}

#[test]
fn ids_and_masks_of_chats_are_those_of_transformers() {
    let golden = golden("train/masks.json");
    let chats = golden["chats"].as_object().unwrap();
    assert_eq!(chats.len(), 8);
    for (name, chat) in chats {
        let data = read(&reading(demo()), &file(&[json!({"messages": chat["messages"]})])).unwrap();
        assert_eq!((data.examples.len(), data.counts.split), (1, 0), "{name}");
        let (ids, learnt) = example(&data, 0);
        assert_eq!(json!(ids), chat["ids"], "{name}");
        let learnt: Vec<u8> = learnt.into_iter().map(u8::from).collect();
        assert_eq!(json!(learnt), chat["supervised"], "{name}");
        let counted: u64 = learnt.iter().map(|l| u64::from(*l)).sum();
        assert_eq!(data.examples.supervised(), counted, "{name}");
    }
}

#[test]
fn every_family_learns_the_content_and_the_end_of_its_turn() {
    for (i, (text, end, opening, knows_system)) in families().into_iter().enumerate() {
        let mut messages = vec![user("Hi"), assistant("Hello!"), user("2+2?"), assistant("4")];
        if knows_system && i != 4 {
            messages.insert(0, system("Be brief."));
        }
        let file = file(&[json!({"messages": messages})]);
        let reading = reading(&text);
        let spans: Vec<String> = learnt(&reading, &file).concat();
        let expected = [format!("{opening}Hello!{end}"), format!("{opening}4{end}")];
        assert_eq!(spans, expected, "family {i}");
        // One example where the template shows an earlier answer as it showed it last.
        let split = [1, 6, 7].contains(&i);
        let data = read(&reading, &file).unwrap();
        assert_eq!(data.examples.len(), 1 + usize::from(split), "family {i}");
        assert_eq!(data.counts.split, u64::from(split), "family {i}");
    }
}

#[test]
fn an_example_begins_with_what_serving_feeds_and_has_one_first_token() {
    for (i, (text, ..)) in families().into_iter().enumerate() {
        let messages = [user("Hi"), assistant("Hello!"), user("2+2?"), assistant("4")];
        // Where a header ends with two newlines, this tokenizer joins them before nothing and not
        // before a word: the first answer follows what serving feeds, a later request's history
        // differs by that token.
        let messages = if i == 3 { &messages[..2] } else { &messages[..] };
        let before = messages.len() - 1;
        let prompt = text.encode(&rendered(&text, &messages[..before], true), false).unwrap();
        let data = read(&reading(&text), &file(&[json!({"messages": messages})])).unwrap();
        let (ids, learnt) = example(&data, data.examples.len() - 1);
        assert_eq!(ids[..prompt.len()], prompt, "family {i}");
        assert!(learnt[prompt.len()], "family {i}");
        if let Some(bos) = text.bos {
            assert!(ids[0] == bos && ids[1] != bos, "family {i}");
        }
    }
}

#[test]
fn a_chat_is_split_where_its_template_drops_earlier_thoughts() {
    let text = text_of(&stock("qwen"), None, &["<|im_end|>"]);
    let thought = "<think>hm</think>\n\nSo.";
    let messages = [user("a"), assistant(thought), user("b"), assistant("c")];
    let file = file(&[json!({"messages": messages})]);
    let reading = reading(&text);
    let shown = previews(&reading, &file);
    let joined: Vec<String> =
        shown.iter().map(|p| p.spans.iter().map(|s| s.text.as_str()).collect()).collect();
    let expected = [rendered(&text, &messages[..2], false), rendered(&text, &messages, false)];
    assert_eq!(joined, expected);
    assert_eq!(
        learnt(&reading, &file),
        [[format!("{thought}<|im_end|>")], ["c<|im_end|>".to_owned()]]
    );
    assert!(!joined[1].contains("hm") && shown.iter().all(|p| p.line == 1));
    // `weight: 0` leaves no example behind.
    let mut first = messages[1].clone();
    first["weight"] = json!(0);
    let weighed = json!({"messages": [messages[0], first, messages[2], messages[3]]});
    assert_eq!(learnt(&reading, &super::file(&[weighed])), [["c<|im_end|>"]]);
}

#[test]
fn an_answer_follows_the_prompt_of_a_request_where_the_template_looks_at_the_last_message() {
    // Of this template a request shows the system message, and a finished chat does not.
    let text = text_of(&stock("mistral"), Some("<s>"), &["</s>"]);
    let messages = [system("Be brief."), user("Hi"), assistant("Hello [/INST] there")];
    let shown = previews(&reading(&text), &file(&[json!({"messages": messages})]));
    let spans: Vec<(&str, bool)> =
        shown[0].spans.iter().map(|s| (s.text.as_str(), s.supervised)).collect();
    let request = "<s>[INST] Be brief.\n\nHi[/INST]";
    assert_eq!(spans, [(request, false), (" Hello [/INST] there</s>", true)]);
    assert_eq!(rendered(&text, &messages[..2], true), request);
}

#[test]
fn a_template_that_cannot_be_trained_on_is_refused_with_the_line() {
    let messages = [user("Hi"), assistant("Hello")];
    let file = file(&[json!({"messages": messages})]);
    let opens = text_of(OPENS_OTHERWISE, None, &["<|im_end|>"]);
    let endless = text_of("{% for m in messages %}{{ m.content }} {% endfor %}", None, &["</s>"]);
    for (text, words) in [(opens, "opens an answer"), (endless, "would never stop")] {
        let e = read(&reading(&text), &file).unwrap_err();
        assert!(e.message.starts_with("line 1: ") && e.message.contains(words), "{}", e.message);
    }
}

#[test]
fn tools_and_calls_are_rendered_as_in_a_request() {
    let text = text_of(&stock("qwen"), None, &["<|im_end|>"]);
    let call = json!({"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type":
        "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]});
    let result = json!({"role": "tool", "tool_call_id": "1", "content": "{}"});
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {}}}]);
    let line = json!({"messages": [user("a"), call, result, assistant("done")], "tools": tools,
        "parallel_tool_calls": false});
    let shown = previews(&reading(&text), &file(&[line]));
    let whole: String = shown[0].spans.iter().map(|s| s.text.as_str()).collect();
    assert!(whole.starts_with("<|im_start|>system\n# Tools"), "{whole}");
    let learnt: Vec<&str> =
        shown[0].spans.iter().filter(|s| s.supervised).map(|s| s.text.as_str()).collect();
    let called =
        "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call><|im_end|>";
    assert_eq!(learnt, [called, "done<|im_end|>"]);
}

#[test]
fn a_completion_follows_its_prompt_as_serving_encodes_it() {
    let text = text_of(&stock("mistral"), Some("<s>"), &["</s>"]);
    let id = |token: &str| text.tokenizer.token_to_id(token).unwrap();
    let line = |completion: &str| json!({"prompt": "The sky is", "completion": completion});
    let data = read(&reading(&text), &file(&[line(" blue"), line(" blue</s>")])).unwrap();
    let prompt = text.encode("The sky is", true).unwrap();
    let whole = [prompt.clone(), text.encode(" blue", false).unwrap(), vec![id("</s>")]].concat();
    for i in 0..2 {
        let (ids, learnt) = example(&data, i);
        assert_eq!(ids, whole, "a written end is not doubled");
        assert_eq!((ids[0], learnt.iter().filter(|l| **l).count()), (id("<s>"), 2));
        assert!(learnt.ends_with(&[false, true, true]));
    }
    // Without a prompt the first token is what nothing predicts.
    let data =
        read(&reading(demo()), &file(&[json!({"prompt": "", "completion": "a b"})])).unwrap();
    assert_eq!(example(&data, 0).1, [false, true, true]);
}

#[test]
fn a_preference_is_two_examples_with_one_prompt() {
    let line = json!({"input": {"messages": [user("Hi")]}, "preferred_output": [assistant("Ahoy")],
        "non_preferred_output": [assistant("Hello to you")]});
    let data = read(&reading(demo()), &file(&[line.clone(), line.clone()])).unwrap();
    assert_eq!((data.examples.len(), data.counts.lines, data.counts.split), (4, 2, 0));
    let prompt = demo().encode_chat(&[user("Hi")], None, true).unwrap();
    let (preferred, other) = (example(&data, 2), example(&data, 3));
    assert!(preferred.0.starts_with(&prompt) && other.0.starts_with(&prompt));
    let spans = learnt(&reading(demo()), &file(&[line]));
    assert_eq!(spans, [["Ahoy<|im_end|>"], ["Hello to you<|im_end|>"]]);
    let first = |learnt: &[bool]| learnt.iter().position(|l| *l);
    assert_eq!((first(&preferred.1), first(&other.1)), (Some(prompt.len()), Some(prompt.len())));
}

#[test]
fn a_tokenizer_that_writes_a_space_before_every_text_writes_none_before_an_answer() {
    let mut tokenizer = sentencepiece(llama2_decoder());
    tokenizer["normalizer"] = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]});
    let text = Text::new(TextSource {
        tokenizer: tokenizer.to_string().parse().unwrap(),
        chat_template: Some(
            "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}\
                             {{ eos_token }}{% else %}!{% endif %}{% endfor %}"
                .into(),
        ),
        bos: Some(1),
        eos: vec![2],
        add_bos: true,
    })
    .unwrap();
    for answer in ["a", " a", "\n"] {
        let messages = [user("a"), assistant(answer)];
        let data = read(&reading(&text), &file(&[json!({"messages": messages})])).unwrap();
        let whole = text.encode(&rendered(&text, &messages, false), false).unwrap();
        assert_eq!(example(&data, 0).0, whole, "{answer:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 60, failure_persistence: None, ..ProptestConfig::default()
    })]

    #[test]
    fn examples_of_any_chat_are_what_serving_encodes(
        which in 0usize..8,
        start in prop::option::of("[a-z]{1,9}"),
        said in prop::collection::vec(
            ("[A-Za-z0-9ü](\\PC|🚲|\n| |東|<\\|im_end\\|>){0,12}", "[A-Za-z0-9é](\\PC| |\n|京){0,12}"),
            1..4),
        weights in prop::collection::vec(0u8..2, 3),
    ) {
        let (text, end, opening, knows_system) = families().swap_remove(which);
        let mut messages: Vec<Value> = start
            .filter(|_| knows_system && which != 4)
            .map(|s| vec![system(&s)])
            .unwrap_or_default();
        let mut given = messages.clone();
        let mut expected = Vec::new();
        for (i, (asked, answered)) in said.iter().enumerate() {
            let weight = if i + 1 == said.len() { 1 } else { weights[i] };
            messages.extend([user(asked), assistant(answered)]);
            given.push(user(asked));
            given.push(json!({"role": "assistant", "content": answered, "weight": weight}));
            if weight == 1 {
                expected.push((messages.len(), answered.as_str()));
            }
        }
        let file = file(&[json!({"messages": given})]);
        let reading = reading(&text);
        let data = read(&reading, &file).unwrap();
        let shown = previews(&reading, &file);
        prop_assert_eq!(shown.len(), data.examples.len());
        let ends = match shown.len() == expected.len() {
            true => expected.iter().map(|(end, _)| *end).collect(),
            false => vec![messages.len()],
        };
        for (i, (preview, end)) in shown.iter().zip(ends).enumerate() {
            let end = if data.examples.len() == 1 { messages.len() } else { end };
            let joined: String = preview.spans.iter().map(|s| s.text.as_str()).collect();
            // This one ends a request with a line more than it writes before an answer.
            let whole = match which {
                1 => {
                    let request = rendered(&text, &messages[..end - 1], true);
                    let after = preview.spans[1..].iter().map(|s| s.text.as_str());
                    request + &after.collect::<String>()
                }
                _ => rendered(&text, &messages[..end], false),
            };
            prop_assert_eq!(&joined, &whole, "example {}", i);
            let ids = example(&data, i).0;
            prop_assert_eq!(&text.decode(&ids, false).unwrap(), &whole);
            // This tokenizer joins two newlines at the end of a header and not before a word.
            if ![1, 3].contains(&which) {
                prop_assert_eq!(ids, text.encode(&whole, false).unwrap());
            }
        }
        let spans = learnt(&reading, &file).concat();
        prop_assert_eq!(spans.len(), expected.len());
        for (span, (_, answered)) in spans.iter().zip(&expected) {
            let exact = [answered, answered.trim()].map(|said| format!("{opening}{said}{end}"));
            prop_assert!(exact.contains(span), "{:?} of {:?}", span, answered);
        }
        // The mask decodes to the same spans.
        let masked: String = (0..data.examples.len())
            .map(|i| {
                let (ids, learnt) = example(&data, i);
                let ids: Vec<u32> =
                    ids.iter().zip(&learnt).filter(|(_, l)| **l).map(|(id, _)| *id).collect();
                text.decode(&ids, false).unwrap()
            })
            .collect();
        prop_assert_eq!(masked, spans.concat());
    }
}
