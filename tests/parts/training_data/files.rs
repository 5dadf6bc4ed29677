//! Files as they come: wrong ones, long ones, cut ones, equal lines, readings that end early.

use super::*;
use polylora::train::data::{Kind, check, shared};
use std::cell::Cell;
use std::io::{BufReader, Read};

fn chat(asked: &str, answered: &str) -> Value {
    json!({"messages": [user(asked), assistant(answered)]})
}

fn refusal(reading: &Reading, file: &[u8]) -> String {
    let e = reading.read(file, &|| false).unwrap_err();
    assert_eq!(e.code, "invalid_training_file");
    e.message
}

/// (a line, what its problem says)
fn wrong_lines() -> Vec<(String, &'static str)> {
    let answer = || json!([assistant("b")]);
    let line = |line: Value| line.to_string();
    let of = |messages: Value| json!({"messages": messages}).to_string();
    vec![
        ("{".into(), "this is not JSON: EOF while parsing an object at column 1"),
        ("[1]".into(), "a line must be an object, not a list"),
        ("{\"a\":".to_owned() + &"[".repeat(100_000), "recursion limit exceeded"),
        (line(json!({})), "there is none of `messages`"),
        (line(json!({"text": "a"})), "there is none of `messages`"),
        (of(json!("a")), "`messages` must be a list, not a string"),
        (of(json!([])), "`messages` must not be empty"),
        (of(json!([5])), "`messages[0]` must be an object, not a number"),
        (of(json!([user("a")])), "no assistant message"),
        (of(json!([user("a"), assistant("b"), user("c")])), "must end with an assistant"),
        (of(json!([assistant("b")])), "which nothing asks for"),
        (of(json!([user("a"), {"role": "assistant"}])), "`messages[1].content` is required"),
        (
            of(json!([user("a"), {"role": "assistant", "content": null}])),
            "`messages[1].content` is required",
        ),
        (of(json!([user("a"), {"role": "king", "content": "b"}])), "`messages[1].role` must be"),
        (of(json!([{"content": "a"}, assistant("b")])), "`messages[0].role` is required"),
        (
            of(json!([{"role": "user", "content": 5}, assistant("b")])),
            "`messages[0].content` must be a string or a list of text parts, not a number",
        ),
        (
            of(json!([{"role": "user", "content": [{"type": "image_url"}]}, assistant("b")])),
            "`messages[0].content[0]` is not a text part",
        ),
        (
            of(json!([user("a"), {"role": "assistant", "content": "b", "wieght": 0}])),
            "`messages[1]` has an unknown field `wieght`",
        ),
        (
            of(json!([user("a"), {"role": "assistant", "content": "b", "weight": 0.5}])),
            "`messages[1].weight` must be 0 or 1",
        ),
        (
            of(json!([user("a"), {"role": "assistant", "content": "b", "weight": "0"}])),
            "`messages[1].weight` must be 0 or 1, not a string",
        ),
        (
            of(json!([{"role": "user", "content": "a", "weight": 1}, assistant("b")])),
            "only assistant messages have a weight",
        ),
        (
            of(json!([user("a"), {"role": "assistant", "content": "b", "weight": 0}])),
            "every assistant message has `weight: 0`",
        ),
        (of(json!(vec![user("a"); 1025])), "`messages` has 1025 entries; at most 1024"),
        (line(json!({"messages": answer(), "colour": 1})), "unknown field `colour`"),
        (line(json!({"messages": answer(), "functions": [{}]})), "send them as `tools`"),
        (line(json!({"messages": answer(), "tools": {}})), "`tools` must be a list"),
        (line(json!({"messages": answer(), "tools": [{}]})), "`tools[0]` must be a function"),
        (
            line(json!({"messages": answer(), "parallel_tool_calls": 1})),
            "`parallel_tool_calls` must be a boolean",
        ),
        (line(json!({"prompt": "a"})), "`completion` is required"),
        (line(json!({"completion": "a"})), "`prompt` is required"),
        (line(json!({"prompt": "a", "completion": ""})), "`completion` is empty"),
        (line(json!({"prompt": ["a"], "completion": "b"})), "`prompt` must be a string"),
        (line(json!({"prompt": "a", "completion": "b", "weight": 1})), "unknown field `weight`"),
    ]
}

fn wrong_pairs() -> Vec<(Value, &'static str)> {
    let pair = |input: Value, preferred: Value, other: Value| {
        json!({"input": input,
        "preferred_output": preferred, "non_preferred_output": other})
    };
    let asked = || json!({"messages": [user("a")]});
    let say = |content: &str| json!([assistant(content)]);
    vec![
        (json!({"input": asked()}), "`preferred_output` is required"),
        (pair(json!("a"), say("b"), say("c")), "`input` must be an object, not a string"),
        (pair(json!({}), say("b"), say("c")), "`input.messages` is required"),
        (
            pair(json!({"messages": [5]}), say("b"), say("c")),
            "`input.messages[0]` must be an object",
        ),
        (pair(json!({"messages": [user("a")], "x": 1}), say("b"), say("c")), "`input.x`"),
        (
            pair(json!({"messages": [user("a"), assistant("x")]}), say("b"), say("c")),
            "`input.messages` must not end with an assistant message",
        ),
        (pair(asked(), json!([user("b")]), say("c")), "`preferred_output` must be a list of one"),
        (
            pair(asked(), say("b"), json!([assistant("c"), assistant("d")])),
            "`non_preferred_output` must be a list of one",
        ),
        (pair(asked(), say("b"), say("b")), "are the same"),
        (chat("a", "b"), "a supervised example where a preference is expected"),
    ]
}

#[test]
fn a_wrong_line_is_refused_by_its_number_and_field() {
    let good = chat("a", "b").to_string();
    for (line, words) in wrong_lines() {
        let message = refusal(&reading(demo()), format!("{good}\n\n{line}\n{good}").as_bytes());
        let begins = message.starts_with("line 3: ");
        assert!(begins && message.contains(words) && !message.contains('\n'), "{line}\n{message}");
    }
    let good = json!({"input": {"messages": [user("a")]}, "preferred_output": [assistant("b")],
        "non_preferred_output": [assistant("c")]});
    for (line, words) in wrong_pairs() {
        let message = refusal(&reading(demo()), file(&[good.clone(), line.clone()]).as_bytes());
        assert!(message.starts_with("line 2: ") && message.contains(words), "{line}\n{message}");
    }
}

#[test]
fn a_check_of_the_form_refuses_the_same_lines_but_for_what_only_encoding_shows() {
    let never = || false;
    for (line, words) in wrong_lines() {
        let checked = check(line.as_bytes(), None, Limits::default(), &never);
        match words.contains("weight: 0`") && words.starts_with("every") {
            true => assert!(checked.is_ok()),
            false => assert!(checked.unwrap_err().message.contains(words), "{line}"),
        }
    }
    let good = file(&[chat("a", "b"), json!({"prompt": "a", "completion": "b"})]);
    let checked = check(good.as_bytes(), None, Limits::default(), &never).unwrap().unwrap();
    assert_eq!((checked.kind, checked.lines), (Kind::Supervised, 2));
    let e = check(good.as_bytes(), Some(Kind::Preference), Limits::default(), &never).unwrap_err();
    assert_eq!(e.message.matches("a supervised example where a preference").count(), 2);
}

#[test]
fn twenty_problems_are_told_and_the_rest_is_counted() {
    let message = refusal(&reading(demo()), "{}\n".repeat(27).as_bytes());
    let lines: Vec<&str> = message.lines().collect();
    assert_eq!(lines.len(), 21);
    assert!(lines[19].starts_with("line 20: ") && lines[20] == "and 7 more", "{message}");
}

#[test]
fn marks_line_ends_and_blank_lines_of_any_editor_are_read_over() {
    let (a, b) = (chat("a", "b"), chat("c", "d"));
    let plain = read(&reading(demo()), &file(&[a.clone(), b.clone()])).unwrap();
    let odd = format!("\u{FEFF}{a}\r\n\r\n{b}\r\n\n  \n");
    let odd = read(&reading(demo()), &odd).unwrap();
    for i in 0..2 {
        assert_eq!(example(&odd, i), example(&plain, i));
    }
    assert_eq!((odd.examples.line(0), odd.examples.line(1)), (1, 3));
    assert_eq!((odd.counts.lines, &odd.digests), (2, &plain.digests));
    for nothing in ["", "\n\r\n \n", "\u{FEFF}"] {
        let message = refusal(&reading(demo()), nothing.as_bytes());
        assert_eq!(message, "the file has no examples");
    }
    assert!(refusal(&reading(demo()), b"\xFF\xFE{\0}\0").contains("line 1: byte 1 is not UTF-8"));
}

#[test]
fn a_line_without_end_ends_as_a_problem_of_that_line() {
    let good = file(&[chat("a", "b")]);
    let long = std::io::repeat(b'[').take(64 << 20);
    let bytes = good.as_bytes().chain(long).chain(&b"\n{}"[..]);
    let e = reading(demo()).read(BufReader::new(bytes), &|| false).unwrap_err();
    let lines: Vec<&str> = e.message.lines().collect();
    assert_eq!(lines[0], "line 2: 67108864 bytes; a line has at most 2097152");
    assert!(lines[1].starts_with("line 3: there is none of"), "{}", e.message);
}

#[test]
fn files_beyond_their_limits_are_refused_where_they_pass_them() {
    let lines = file(&vec![chat("a", "b"); 4]);
    let limits = Limits { lines: 3, ..Limits::default() };
    let message = refusal(&Reading { limits, ..reading(demo()) }, lines.as_bytes());
    assert_eq!(message, "line 4: more than 3 lines");
    let tokens = read(&reading(demo()), &lines).unwrap().examples.tokens();
    let limits = |tokens| Limits { tokens, ..Limits::default() };
    assert!(read(&Reading { limits: limits(tokens), ..reading(demo()) }, &lines).is_ok());
    let short = Reading { limits: limits(tokens - 1), ..reading(demo()) };
    let message = refusal(&short, lines.as_bytes());
    assert_eq!(message, format!("line 4: the file has more than {} tokens", tokens - 1));
}

#[test]
fn a_template_that_refuses_or_never_ends_is_a_problem_of_the_line() {
    let raising = "{% if messages[0].content == 'bad' %}{{ raise_exception('Not this one.') }}\
                   {% endif %}{% if messages[0].content == 'long' %}{% for i in range(99999) %}{% \
                   for k in range(99999) %}x{% endfor %}{% endfor %}{% endif %}{% for m in \
                   messages %}{{ m.content }}<|im_end|>{% endfor %}";
    let text = text_of(raising, None, &["<|im_end|>"]);
    let lines = file(&[chat("a", "b"), chat("bad", "b"), chat("long", "b")]);
    let message = refusal(&reading(&text), lines.as_bytes());
    let told: Vec<&str> = message.lines().collect();
    assert_eq!(told.len(), 2);
    assert_eq!(told[0], "line 2: the chat template refused the messages: Not this one.");
    assert!(told[1].starts_with("line 3: the chat template "), "{message}");
}

#[test]
fn a_long_example_is_refused_or_cut_at_its_end() {
    let long = chat("a", &"word ".repeat(200));
    let lines = file(&[chat("a", "b"), long.clone(), chat("c", "d")]);
    let whole = read(&reading(demo()), &lines).unwrap();
    let short = Reading { context: 100, ..reading(demo()) };
    let message = refusal(&short, lines.as_bytes());
    assert!(message.starts_with("line 2: the example (") && message.ends_with("100 tokens"));
    let cutting = Reading { truncate: true, ..short };
    let cut = read(&cutting, &lines).unwrap();
    assert_eq!((cut.counts.cut, cut.examples.longest(), cut.examples.len()), (1, 100, 3));
    assert_eq!(example(&cut, 1).0, example(&whole, 1).0[..100]);
    assert_eq!(example(&cut, 1).1, example(&whole, 1).1[..100]);
    let shown = &previews(&cutting, &lines)[1];
    assert!(shown.cut && shown.tokens == 100 && shown.spans.last().unwrap().supervised);
    let joined: String = shown.spans.iter().map(|s| s.text.as_str()).collect();
    assert_eq!(joined, demo().decode(&example(&cut, 1).0, false).unwrap());

    // Much longer than is encoded at once, and nothing of the answer left.
    let lines = file(&[chat("a", "b"), chat(&"word ".repeat(200_000), "b")]);
    let message = refusal(&cutting, lines.as_bytes());
    assert_eq!(message, "line 2: cut to the context, no token of an answer is left");
    let dropping = Reading { drop_unsupervised: true, ..cutting };
    let data = read(&dropping, &lines).unwrap();
    assert_eq!((data.examples.len(), data.counts.dropped, data.counts.cut), (1, 1, 0));
}

#[test]
fn what_teaches_nothing_is_dropped_and_counted_where_the_caller_wants_that() {
    let silent = json!({"messages": [user("a"), {"role": "assistant", "content": "b",
        "weight": 0}]});
    let dropping = Reading { drop_unsupervised: true, ..reading(demo()) };
    let data = read(&dropping, &file(&[silent.clone(), chat("a", "b")])).unwrap();
    assert_eq!((data.examples.len(), data.counts.dropped, data.counts.lines), (1, 1, 2));
    assert_eq!(previews(&dropping, &file(&[silent.clone(), chat("a", "b")])).len(), 1);
    assert!(refusal(&dropping, file(&[silent]).as_bytes()).contains("all lines were dropped"));
}

#[test]
fn equal_lines_are_counted_within_a_file_and_between_two() {
    let (a, b, c) = (chat("a", "b"), chat("c", "d"), chat("e", "f"));
    let first = read(&reading(demo()), &file(&[a.clone(), b.clone(), a.clone(), a])).unwrap();
    let second = read(&reading(demo()), &file(&[c, b])).unwrap();
    assert_eq!((first.counts.duplicates, first.examples.len()), (2, 4), "counted, not dropped");
    assert_eq!((first.digests.len(), second.counts.duplicates), (2, 0));
    assert!(first.digests.is_sorted() && second.digests.is_sorted());
    assert_eq!(shared(&first.digests, &second.digests), 1);
    assert_eq!(shared(&first.digests, &first.digests), 2);
    assert_eq!(shared(&first.digests, &[]), 0);
}

#[test]
fn a_reading_ends_between_two_renderings_once_it_is_over() {
    let lines = file(&vec![chat("a", "b"); 1000]);
    let asked = Cell::new(0);
    let over = || {
        asked.set(asked.get() + 1);
        asked.get() > 10
    };
    assert!(reading(demo()).read(lines.as_bytes(), &over).unwrap().is_none());
    assert_eq!(asked.get(), 11);
    assert!(check(lines.as_bytes(), None, Limits::default(), &|| true).unwrap().is_none());
    // Within a line, too: of 400 answers each is two renderings.
    let messages: Vec<Value> = (0..400).flat_map(|_| [user("a"), assistant("b")]).collect();
    asked.set(0);
    let line = file(&[json!({"messages": messages})]);
    assert!(reading(demo()).read(line.as_bytes(), &over).unwrap().is_none());
    assert_eq!(asked.get(), 11);
}

#[test]
fn a_preview_reads_no_further_than_it_shows() {
    let lines = file(&[chat("a", "b"), chat("c", "d")]) + "{}\n";
    let shown = reading(demo()).preview(lines.as_bytes(), 2, &|| false).unwrap().unwrap();
    assert_eq!(shown.iter().map(|p| p.line).collect::<Vec<_>>(), [1, 2]);
    let data = read(&reading(demo()), &file(&[chat("a", "b")])).unwrap();
    assert_eq!((shown[0].tokens, shown[0].supervised), (data.examples.longest(), 2));
    let e = reading(demo()).preview(lines.as_bytes(), 3, &|| false).unwrap_err();
    assert!(e.message.starts_with("line 3: "));
}
