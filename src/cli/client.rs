//! The way to a running server: one HTTP client for chat, adapter, bench and health.
//!
//! Owns addresses, keys and how a server's refusal becomes one line. Never prints. The thing to
//! know: a server on this machine is reached directly, whatever proxy the environment names.

use super::calls::bad_argument;
use super::sse::{SseEvent, SseReader};
use crate::error::{Error, Kind, Result, brief};
use clap::Args;
use futures::StreamExt;
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde_json::Value;
use std::collections::VecDeque;
use std::time::Duration;

pub const URL: &str = "http://127.0.0.1:8080";

/// Where the server is and how to get in; part of every client command,
/// before its verb or after.
#[derive(Debug, Clone, Args)]
pub struct ServerArgs {
    /// Address of the server, without /v1
    #[arg(long, global = true, env = "POLYLORA_URL", default_value = URL, value_name = "URL")]
    pub url: String,
    /// Key of the server; prefer the variable, others can read flags
    #[arg(
        long,
        global = true,
        env = "POLYLORA_API_KEY",
        value_name = "KEY",
        hide_env_values = true
    )]
    pub api_key: Option<String>,
}

/// Why a request brought no answer.
#[derive(Debug, Clone)]
pub struct Refusal {
    /// Short and stable, for counting: `429 queue_full`, `unreachable`, `timeout`, `stream:
    /// internal_error`.
    pub label: String,
    /// One line for a person.
    pub message: String,
}

impl Refusal {
    fn new(label: impl Into<String>, message: impl Into<String>) -> Self {
        Self { label: label.into(), message: message.into() }
    }
}

impl From<Refusal> for Error {
    fn from(r: Refusal) -> Self {
        Error::new(Kind::Unavailable, "refused", r.message)
    }
}

type Answer<T> = Result<T, Refusal>;

/// A server.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    pub url: String,
    key: Option<String>,
}

impl Client {
    /// `url` with or without a trailing slash or `/v1`. `timeout` bounds one whole request.
    pub fn new(server: &ServerArgs, timeout: Duration) -> Result<Self> {
        let url = server.url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        let parsed = reqwest::Url::parse(&url)
            .ok()
            .filter(|u| u.scheme().starts_with("http") && u.has_host())
            .ok_or_else(|| {
                bad_argument(format!("--url '{}' is no address; expected e.g. {URL}", server.url))
            })?;
        let host = parsed.host_str().unwrap_or_default().trim_matches(['[', ']']);
        let here = host == "localhost"
            || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback());
        let mut builder = crate::tls::client()
            .connect_timeout(Duration::from_secs(10))
            .timeout(timeout)
            .tcp_nodelay(true);
        if here {
            builder = builder.no_proxy();
        }
        let http = builder
            .build()
            .map_err(|e| Error::fault(format!("cannot make an HTTP client: {}", causes(&e))))?;
        Ok(Self { http, url, key: server.api_key.clone() })
    }

    /// A request to `path` with the key in it.
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.url));
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    /// Sends it; any status but 2xx is an error with the server's code in its message.
    pub async fn send(&self, request: RequestBuilder) -> Answer<Response> {
        let response = request.send().await.map_err(|e| self.unreachable(&e))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = response.text().await.unwrap_or_default();
        Err(refusal(status, &body))
    }

    pub async fn json(&self, request: RequestBuilder) -> Answer<Value> {
        let response = self.send(request).await?;
        let text = response.text().await.map_err(|e| self.unreachable(&e))?;
        serde_json::from_str(&text).map_err(|e| {
            let message =
                format!("{} did not answer with JSON ({e}); is it the right --url?", self.url);
            Refusal::new("not json", message)
        })
    }

    /// Sends a streaming request; its events come from [`Events::next`].
    pub async fn events(&self, request: RequestBuilder) -> Answer<Events> {
        let response = self.send(request).await?;
        Ok(Events {
            body: response.bytes_stream().boxed(),
            reader: SseReader::default(),
            ready: VecDeque::new(),
        })
    }

    /// Ids of `GET /v1/models`, in the server's order: the base comes first here.
    pub async fn models(&self) -> Answer<Vec<String>> {
        let list = self.json(self.request(Method::GET, "/v1/models")).await?;
        let ids = list["data"].as_array().into_iter().flatten();
        Ok(ids.filter_map(|m| m["id"].as_str()).map(str::to_owned).collect())
    }

    fn unreachable(&self, e: &reqwest::Error) -> Refusal {
        let (url, why) = (&self.url, causes(e));
        if e.is_timeout() {
            Refusal::new("timeout", format!("{url} did not answer in time"))
        } else if e.is_connect() {
            let message = format!("cannot reach {url} ({why}); is 'polylora serve' running there?");
            Refusal::new("unreachable", message)
        } else {
            Refusal::new("connection lost", format!("{url}: {why}"))
        }
    }
}

/// The events of one answer.
pub struct Events {
    body: futures::stream::BoxStream<'static, reqwest::Result<bytes::Bytes>>,
    reader: SseReader,
    ready: VecDeque<SseEvent>,
}

impl Events {
    /// The next event's JSON; `None` at `[DONE]` or the end. An `error` event, or an `error` object
    /// in the data, is an error.
    pub async fn next(&mut self) -> Answer<Option<Value>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                if event.data == "[DONE]" {
                    return Ok(None);
                }
                let value: Value = serde_json::from_str(&event.data).map_err(|e| {
                    let message = format!("the stream brought '{}', not JSON ({e})", event.data);
                    Refusal::new("stream: not json", message)
                })?;
                if event.name == "error" || value.get("error").is_some_and(|e| !e.is_null()) {
                    return Err(refusal(StatusCode::OK, &event.data));
                }
                return Ok(Some(value));
            }
            match self.body.next().await {
                Some(Ok(bytes)) => self.ready.extend(self.reader.push(&bytes)),
                Some(Err(e)) => {
                    let label = if e.is_timeout() { "timeout" } else { "stream: broken off" };
                    return Err(Refusal::new(label, format!("{label}: {}", causes(&e))));
                }
                None => return Ok(None),
            }
        }
    }
}

/// The server's own words: message and code of OpenAI's error object, or the start of whatever
/// came.
fn refusal(status: StatusCode, body: &str) -> Refusal {
    let value: Value = serde_json::from_str(body).unwrap_or(Value::Null);
    let error = &value["error"];
    let said = error["message"].as_str().or_else(|| error.as_str());
    let said = said.map_or_else(|| brief(body), str::to_owned);
    let code = ["code", "type"].iter().find_map(|k| error[*k].as_str());
    let label = match status {
        StatusCode::OK => format!("stream: {}", code.unwrap_or("error")),
        s => format!("{} {}", s.as_u16(), code.unwrap_or_default()),
    };
    let label = label.trim().to_owned();
    let message = format!("{} ({label})", said.trim());
    Refusal { label, message }
}

/// An error and what caused it, on one line.
fn causes(e: &dyn std::error::Error) -> String {
    let mut last = e;
    while let Some(cause) = last.source() {
        last = cause;
    }
    last.to_string()
}

const HEALTH_EXAMPLES: &str = "\
Examples:
  polylora health                 exit code 0 when the server on 127.0.0.1:8080 is ready
  polylora health --wait 60       the same, waiting up to a minute for it";

/// Options of `health`.
#[derive(Debug, Args)]
#[command(after_help = HEALTH_EXAMPLES)]
pub struct HealthArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// Seconds to wait for it to become ready
    #[arg(long, default_value_t = 0, value_name = "SECONDS")]
    wait: u64,
}

/// Succeeds when `/ready` answers 200 within the wait.
pub fn health(args: HealthArgs) -> Result<()> {
    let client = Client::new(&args.server, Duration::from_secs(5))?;
    crate::cli::calls::block_on(async {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(args.wait);
        loop {
            match client.send(client.request(Method::GET, "/ready")).await {
                Ok(_) => return Ok(()),
                Err(e) if tokio::time::Instant::now() >= deadline => return Err(e.into()),
                Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        }
    })
}
