//! Routes and fields of other servers: byte by byte where their tools compare bytes.

use crate::api::keys::{ask, make};
use reqwest::Method;
use serde_json::{Value, json};
use support::live::{Answer, BASE, Live, hello, whole, with};

/// The error in vLLM's words: `status type code`.
fn peer(answer: &Answer) -> String {
    let error = &answer.json()["error"];
    assert!(error["message"].as_str().is_some_and(|m| !m.is_empty()) && error["param"].is_null());
    format!("{} {} {}", answer.status, error["type"].as_str().expect("a type"), error["code"])
}

#[tokio::test]
async fn an_adapter_below_an_allowed_directory_is_loaded_and_unloaded_in_vllms_words() {
    let dir = tempfile::tempdir().expect("a directory");
    let root = dir.path().join("adapters");
    std::fs::create_dir(&root).expect("made");
    let live = Live::start(&["--adapter-dirs", &root.to_string_lossy()]);
    for (name, seed) in [("sql", 1), ("other", 2)] {
        let to = root.join(name);
        std::fs::rename(live.adapter_files(seed, 0.3), to).expect("moved");
    }
    std::fs::create_dir(root.join("empty")).expect("made");
    let at = |name: &str| root.join(name).to_string_lossy().into_owned();
    let load = async |body: Value| live.post("/v1/load_lora_adapter", body).await;
    let unload = async |body: Value| live.post("/v1/unload_lora_adapter", body).await;

    let done = load(json!({"lora_name": "sql", "lora_path": at("sql")})).await;
    assert_eq!(
        (done.status, done.text.as_str()),
        (200, "Success: LoRA adapter 'sql' added successfully.")
    );
    assert!(done.header("content-type").starts_with("text/plain"));
    assert_eq!(live.chat(hello("sql", 2)).await.header("x-polylora-adapter"), "sql@1");
    let again = json!({"lora_name": "sql", "lora_path": at("other")});
    assert_eq!(peer(&load(again.clone()).await), "400 InvalidUserInput 400");
    let inplace = load(with(again, json!({"load_inplace": true}))).await;
    assert_eq!(inplace.status, 200, "{}", inplace.text);
    assert_eq!(live.chat(hello("sql", 2)).await.header("x-polylora-adapter"), "sql@2");
    for (body, expected) in [
        (json!({"lora_name": "x"}), "400 InvalidUserInput 400"),
        (json!({"lora_path": at("sql")}), "400 InvalidUserInput 400"),
        (json!({"lora_name": "x", "lora_path": at("nobody")}), "404 NotFoundError 404"),
        (json!({"lora_name": "x", "lora_path": at("empty")}), "404 NotFoundError 404"),
        (json!({"lora_name": "a/b", "lora_path": at("sql")}), "400 InvalidUserInput 400"),
    ] {
        assert_eq!(peer(&load(body.clone()).await), expected, "{body}");
    }
    let done = unload(json!({"lora_name": "sql", "lora_int_id": 3})).await;
    let text = "Success: LoRA adapter 'sql' removed successfully.";
    assert_eq!((done.status, done.text.as_str()), (200, text));
    assert_eq!(peer(&unload(json!({"lora_name": "sql"})).await), "404 NotFoundError 404");
    assert_eq!(peer(&unload(json!({})).await), "400 InvalidUserInput 400");
}

#[tokio::test]
async fn no_path_leads_out_of_the_allowed_directories() {
    let dir = tempfile::tempdir().expect("a directory");
    let root = dir.path().join("allowed");
    std::fs::create_dir(&root).expect("made");
    let live = Live::start(&["--adapter-dirs", &root.to_string_lossy()]);
    let outside = dir.path().join("outside");
    std::fs::rename(live.adapter_files(1, 0.3), &outside).expect("moved");
    std::os::unix::fs::symlink(&outside, root.join("link")).expect("a link");
    let files = root.join("files");
    std::fs::create_dir(&files).expect("made");
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        std::os::unix::fs::symlink(outside.join(name), files.join(name)).expect("a link");
    }
    let load = async |path: String| {
        live.post("/v1/load_lora_adapter", json!({"lora_name": "x", "lora_path": path})).await
    };
    let root = root.to_string_lossy().into_owned();
    let mut answers = Vec::new();
    for path in [
        outside.to_string_lossy().into_owned(),
        dir.path().join("nothing").to_string_lossy().into_owned(),
        format!("{root}/link"),
        format!("{root}/../outside"),
        format!("{root}/../nothing"),
        format!("{root}-but-longer"),
        "outside".to_owned(),
        "/etc".to_owned(),
    ] {
        let answer = load(path.clone()).await;
        assert_eq!(peer(&answer), "400 InvalidUserInput 400", "{path}");
        answers.push(answer.text);
    }
    answers.dedup();
    assert_eq!(answers.len(), 1, "what is there and what is not look alike");
    assert_eq!(peer(&load(format!("{root}/files")).await), "404 NotFoundError 404", "file links");
    assert_eq!(live.get("/v1/adapters").await.json()["data"], json!([]));
    let shut = Live::start(&[]);
    let path = outside.to_string_lossy().into_owned();
    let body = json!({"lora_name": "x", "lora_path": path});
    let answer = shut.post("/v1/load_lora_adapter", body).await;
    assert_eq!(peer(&answer), "400 InvalidUserInput 400", "without adapter_dirs nothing is read");
}

#[tokio::test]
async fn openais_delete_and_loraxs_adapter_id_are_understood() {
    let live = Live::start(&[]);
    live.upload("sql", 1).await;
    let by = async |more: Value| live.chat(with(hello(BASE, 2), more)).await;
    assert_eq!(by(json!({"adapter_id": "sql"})).await.header("x-polylora-adapter"), "sql@1");
    let local = by(json!({"adapter_id": "sql@1", "adapter_source": "local"})).await;
    assert_eq!(local.header("x-polylora-adapter"), "sql@1");
    assert_eq!(by(json!({"adapter_id": ""})).await.header("x-polylora-adapter"), "base");
    for (more, expected) in [
        (json!({"adapter_id": "nobody"}), "404 model_not_found model"),
        (json!({"adapter_id": "../sql"}), "404 model_not_found model"),
        (
            json!({"adapter_id": "sql", "adapter_source": "hub"}),
            "400 unsupported_parameter adapter_source",
        ),
        (json!({"model": "sql@1", "adapter_id": "sql"}), "400 invalid_value adapter_id"),
    ] {
        assert_eq!(by(more.clone()).await.error(), expected, "{more}");
    }
    let delete =
        async |id: &str| whole(live.request(Method::DELETE, &format!("/v1/models/{id}"))).await;
    assert_eq!(delete("sql@1").await.error(), "400 invalid_value model");
    assert_eq!(delete(BASE).await.error(), "400 invalid_value model");
    let gone = delete("sql").await;
    assert_eq!(gone.json(), json!({"id": "sql", "object": "model", "deleted": true}));
    assert_eq!(delete("sql").await.error(), "404 model_not_found model");
}

#[tokio::test]
async fn each_method_of_a_path_wants_its_own_scope() {
    let live = Live::start(&["--api-key", "secret"]);
    let (key, _) = make(&live, json!({"scopes": ["inference"]})).await;
    let path = format!("/v1/models/{BASE}");
    assert_eq!(ask(&live, Method::GET, &path, &key, Value::Null).await.status, 200);
    let refused = ask(&live, Method::DELETE, &path, &key, Value::Null).await;
    assert_eq!(refused.error(), "403 insufficient_scope -");
    for path in ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"] {
        let refused = ask(&live, Method::POST, path, &key, json!({})).await;
        assert_eq!(refused.error(), "403 insufficient_scope -");
    }
}
