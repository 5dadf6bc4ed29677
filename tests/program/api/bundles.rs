//! Adapters with a chat template and generation defaults of their own, through HTTP.

use reqwest::Method;
use reqwest::multipart::Part;
use serde_json::{Value, json};
use support::live::{Answer, BASE, Live, form, hello, whole, with};

const SHOUTING: &str = "{% for m in messages %}<{{ m.role }}!>{{ m.content }}{{ eos_token }}\
                        {% endfor %}{% if add_generation_prompt %}<go>{% endif %}";

/// Uploads a random adapter with files beside it.
pub async fn upload(
    live: &Live,
    name: &str,
    seed: u64,
    beside: &[(&'static str, String)],
) -> Answer {
    let mut form = form(&live.adapter_files(seed, 0.3));
    for (file, text) in beside {
        form = form.part(*file, Part::bytes(text.clone().into_bytes()).file_name(*file));
    }
    let path = format!("/v1/adapters/{name}");
    whole(live.request(Method::PUT, &path).multipart(form)).await
}

pub fn jinja(text: &str) -> (&'static str, String) {
    ("chat_template.jinja", text.to_owned())
}

fn generation(fields: Value) -> (&'static str, String) {
    ("generation_config.json", fields.to_string())
}

/// The prompt that a chat becomes, as text.
pub async fn prompt(live: &Live, model: &str) -> String {
    let messages = json!([{"role": "user", "content": "hello"}]);
    let asked = json!({"model": model, "messages": messages});
    let tokens = live.post("/tokenize", asked).await.json()["tokens"].clone();
    let text = live.post("/detokenize", json!({"tokens": tokens})).await.json();
    text["prompt"].as_str().expect("text").to_owned()
}

#[tokio::test]
async fn each_adapter_renders_chats_with_its_own_template_and_the_base_with_its() {
    let live = Live::start(&[]);
    let own = json!({"chat_template": "Q: {{ messages[0].content }}{{ bos_token }}",
                     "bos_token": "<eos>"});
    assert_eq!(upload(&live, "loud", 1, &[jinja(SHOUTING)]).await.status, 201);
    let quiet = upload(&live, "quiet", 1, &[("tokenizer_config.json", own.to_string())]).await;
    assert_eq!((quiet.status, &quiet.json()["chat_template"]), (201, &true.into()));
    assert_eq!(live.upload("plain", 1).await.json()["chat_template"], false);
    for (model, expected) in [
        ("loud", "<user!>hello<eos><go>"),
        ("quiet", "Q: hello<eos>"),
        ("plain", "user: hello\nassistant: "),
        (BASE, "user: hello\nassistant: "),
    ] {
        assert_eq!(prompt(&live, model).await, expected, "{model}");
        // One character is one token here, and <eos> is one.
        let tokens = expected.replace("<eos>", "E").len();
        let answer = live.chat(hello(model, 2)).await;
        assert_eq!(answer.json()["usage"]["prompt_tokens"], tokens, "{model}: {}", answer.text);
    }
    let shown = live.get("/v1/adapters/loud").await.json();
    assert_eq!(shown["versions"][0]["chat_template"], true);
    assert!(shown["versions"][0]["generation"].is_null());
    // The same factors under another template are another version.
    let put = upload(&live, "loud", 1, &[]).await.json();
    assert_eq!((&put["version"], &put["chat_template"]), (&2.into(), &false.into()));
    assert_eq!(prompt(&live, "loud").await, "user: hello\nassistant: ");
    assert_eq!(prompt(&live, "loud@1").await, "<user!>hello<eos><go>");
}

#[tokio::test]
async fn an_adapters_defaults_hold_where_the_request_says_nothing() {
    let live = Live::start(&[]);
    let file = generation(json!({"do_sample": false, "max_new_tokens": 7}));
    let put = upload(&live, "calm", 1, &[file]).await;
    assert_eq!(put.status, 201, "{}", put.text);
    assert_eq!(put.json()["generation"]["max_tokens"], 7);
    assert_eq!(put.json()["generation"]["temperature"], 0.0);
    live.upload("plain", 1).await;
    let ask = async |more: Value| {
        let body = json!({"model": "calm", "ignore_eos": true,
                          "messages": [{"role": "user", "content": "hello"}]});
        let answer = live.chat(with(body, more)).await.json();
        let text = answer["choices"][0]["message"]["content"].as_str().expect("text").to_owned();
        (text, answer["usage"]["completion_tokens"].as_u64().expect("a count"))
    };
    let greedy = ask(json!({"model": "plain", "temperature": 0, "max_tokens": 7})).await;
    assert_eq!(ask(json!({})).await, greedy, "the adapter's defaults");
    assert_eq!(ask(json!({"seed": 5})).await, greedy, "greedy whatever the seed");
    assert_eq!(ask(json!({"max_tokens": 3})).await.1, 3, "the request's own wins");
    assert_eq!(ask(json!({"max_completion_tokens": 4})).await.1, 4);
    let hot = |model: &str| json!({"model": model, "temperature": 2, "seed": 5, "max_tokens": 7});
    assert_eq!(ask(hot("calm")).await, ask(hot("plain")).await, "so does its temperature");
    assert_ne!(ask(hot("calm")).await, greedy, "which is another answer");
    let plain = json!({"model": "calm", "prompt": "hello", "ignore_eos": true});
    assert_eq!(live.complete(plain).await.json()["usage"]["completion_tokens"], 7);
    let long = json!({"model": "calm", "prompt": "hello", "ignore_eos": true, "max_tokens": 9});
    assert_eq!(live.complete(long).await.json()["usage"]["completion_tokens"], 9);
}

#[tokio::test]
async fn an_adapters_stop_tokens_end_its_answers_and_nobody_elses() {
    let live = Live::start(&[]);
    live.upload("plain", 1).await;
    let body = |model: &str| {
        json!({"model": model, "temperature": 0, "max_tokens": 8,
        "logprobs": true, "messages": [{"role": "user", "content": "hello"}]})
    };
    let free = live.chat(with(body("plain"), json!({"ignore_eos": true}))).await.json();
    let third = free["choices"][0]["logprobs"]["content"][2]["bytes"][0].as_u64().expect("a byte");
    let file = generation(json!({"eos_token_id": [third], "stop_strings": "never this"}));
    assert_eq!(upload(&live, "ending", 1, &[file]).await.status, 201);
    let ended = live.chat(body("ending")).await.json();
    assert_eq!(ended["choices"][0]["finish_reason"], "stop", "{ended}");
    assert!(ended["usage"]["completion_tokens"].as_u64().unwrap() <= 3, "{ended}");
    let more = live.chat(with(body("ending"), json!({"ignore_eos": true}))).await.json();
    assert_eq!(more["usage"]["completion_tokens"], 8, "ignore_eos ignores them too");
}

#[tokio::test]
async fn a_template_that_means_harm_is_refused_or_fails_its_own_request_only() {
    let live = Live::start(&[]);
    let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    let refused = upload(&live, "bad", 1, &[jinja(endless)]).await;
    assert_eq!(refused.error(), "422 invalid_chat_template chat_template");
    let broken = upload(&live, "bad", 1, &[jinja("a\nb\n{% if %}")]).await;
    assert_eq!(broken.error(), "422 invalid_chat_template chat_template");
    assert!(broken.text.contains(":3"), "names the line: {}", broken.text);
    let beams = upload(&live, "bad", 1, &[generation(json!({"num_beams": 4}))]).await;
    assert_eq!(beams.error(), "422 unsupported_generation_field num_beams");
    assert_eq!(live.get("/v1/adapters").await.json()["data"], json!([]));

    let doubling = "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(60) %}\
                    {% set ns.s = ns.s ~ ns.s %}{% endfor %}";
    let said = "messages[0].content";
    let hiding = format!("{{{{ {said} }}}}{{% if 'now' in {said} %}}{doubling}{{% endif %}}");
    let put = upload(&live, "trap", 1, &[jinja(&hiding)]).await;
    assert_eq!(put.status, 201, "{}", put.text);
    let say = |text: &str| {
        with(
            hello("trap", 1),
            json!({"messages": [
        {"role": "user", "content": text}]}),
        )
    };
    assert_eq!(live.chat(say("now")).await.error(), "400 chat_template_error messages");
    assert_eq!(live.chat(say("later")).await.status, 200);
    assert_eq!(live.chat(hello(BASE, 1)).await.status, 200);
}
