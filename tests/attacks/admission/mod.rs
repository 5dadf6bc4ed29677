//! Work before a request is admitted: bodies, prompts, templates, patterns, archives. Nobody's
//! flood makes another tenant wait.

mod attackers;
mod bodies;
mod keys;
mod long;
mod prompts;
mod templates;
mod uploads;

use reqwest::Method;
use serde_json::{Value, json};
use std::path::PathBuf;
use support::live::{Answer, BASE, Live, hello, whole};

/// A server with two tenants, of which one means harm.
pub struct Two {
    pub live: Live,
    pub mallory: String,
    pub canary: String,
}

impl Two {
    pub async fn start(more: &[&str]) -> Self {
        let flags: Vec<&str> =
            ["--api-key", "secret"].into_iter().chain(more.iter().copied()).collect();
        let live = Live::start(&flags);
        let (mallory, canary) = (key(&live, "mallory").await, key(&live, "canary").await);
        Self { live, mallory, canary }
    }

    pub async fn post(&self, key: &str, path: &str, body: &Value) -> Answer {
        self.raw(key, path, body.to_string()).await
    }

    pub async fn raw(&self, key: &str, path: &str, body: impl Into<reqwest::Body>) -> Answer {
        let request = self.live.request(Method::POST, path).bearer_auth(key);
        whole(request.header("content-type", "application/json").body(body)).await
    }

    /// The neighbour is answered, and so is whoever asks whether the server lives.
    pub async fn others_are_well(&self) {
        let answer = self.post(&self.canary, "/v1/chat/completions", &hello(BASE, 2)).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        assert_eq!(self.live.get("/live").await.status, 200);
    }

    /// Most memory that the server ever had, in kB.
    pub fn peak(&self) -> u64 {
        support::server::kilobytes(self.live.server.id(), "VmHWM:")
    }

    /// Uploads an adapter with more in its config, and more files.
    pub async fn upload(
        &self,
        key: &str,
        name: &str,
        config: Value,
        files: &[(&'static str, Vec<u8>)],
    ) -> Answer {
        let dir: PathBuf = self.live.adapter_files(name.len() as u64, 0.3);
        let read = |file: &str| std::fs::read(dir.join(file)).expect("a file");
        let mut own: Value = serde_json::from_slice(&read("adapter_config.json")).expect("JSON");
        let fields = own.as_object_mut().expect("an object");
        fields.extend(config.as_object().cloned().unwrap_or_default());
        let part =
            |name: &'static str, bytes| reqwest::multipart::Part::bytes(bytes).file_name(name);
        let mut form = reqwest::multipart::Form::new()
            .part("c", part("adapter_config.json", own.to_string().into_bytes()))
            .part("t", part("adapter_model.safetensors", read("adapter_model.safetensors")));
        for (name, bytes) in files {
            form = form.part(*name, part(name, bytes.clone()));
        }
        let request = self.live.request(Method::PUT, &format!("/v1/adapters/{name}"));
        whole(request.bearer_auth(key).multipart(form)).await
    }
}

/// A key of this tenant for names of its own.
pub async fn key(live: &Live, tenant: &str) -> String {
    let body = json!({"scopes": ["inference", "admin"], "tenant": tenant,
                      "adapters": [format!("{tenant}-*")]});
    limited(live, body).await
}

pub async fn limited(live: &Live, body: Value) -> String {
    let request = live.request(Method::POST, "/v1/keys").bearer_auth("secret").json(&body);
    let made = whole(request).await;
    assert_eq!(made.status, 201, "{}", made.text);
    made.json()["secret"].as_str().expect("a secret").to_owned()
}
