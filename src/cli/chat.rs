//! `polylora chat`: a conversation in the terminal, streamed.
//!
//! Owns the conversation and the slash commands. Never trims it: a conversation longer than the
//! model's context is the server's error to report. The thing to know: switching the model keeps
//! the conversation, so adapters can be compared.

use super::client::{Client, ServerArgs};
use crate::error::{Error, Result};
use crate::terminal;
use crate::terminal::say;
use clap::Args;
use reqwest::Method;
use serde_json::{Value, json};
use std::io::{BufRead, IsTerminal};
use std::time::Duration;
use tokio::sync::mpsc;

const EXAMPLES: &str = "\
Examples:
  polylora chat                                        talk to the base model
  polylora chat --model-name pirate                    talk to an adapter
  polylora chat --model-name sql 'Table t(a). How many rows?'    one question, one answer

In the conversation: /model NAME, /models, /reset, /quit. Ctrl-C stops an answer.";

/// Options of `chat`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ChatArgs {
    /// One question: print its answer and end
    prompt: Option<String>,
    #[command(flatten)]
    server: ServerArgs,
    /// Adapter or base model to talk to; default: the server's base model
    #[arg(long, value_name = "NAME")]
    model_name: Option<String>,
    /// System message
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Sampling temperature; 0 always takes the likeliest token
    #[arg(long, value_name = "T")]
    temperature: Option<f64>,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 512, value_name = "N")]
    max_tokens: u32,
}

/// One conversation with one server.
struct Conversation {
    client: Client,
    model: String,
    system: Option<String>,
    messages: Vec<Value>,
    temperature: Option<f64>,
    max_tokens: u32,
}

pub fn run(args: ChatArgs) -> Result<()> {
    crate::cli::calls::block_on(async {
        let client = Client::new(&args.server, Duration::from_secs(3600))?;
        let model = match args.model_name {
            Some(name) => name,
            None => client.models().await?.into_iter().next().ok_or_else(|| {
                Error::not_found("model_not_found", format!("{} serves no model", client.url))
            })?,
        };
        let mut talk = Conversation {
            client,
            model,
            system: args.system,
            messages: Vec::new(),
            temperature: args.temperature,
            max_tokens: args.max_tokens,
        };
        match args.prompt {
            Some(prompt) => talk.ask(&prompt).await,
            None => talk.interact().await,
        }
    })
}

impl Conversation {
    /// Reads lines until the end of input or /quit. A refused question is shown, and the
    /// conversation goes on; lines that nobody types end with it.
    async fn interact(&mut self) -> Result<()> {
        let mut lines = typed_lines();
        say(&format!(
            "Talking to {} at {}. /quit ends, /model NAME switches.\n",
            self.model, self.client.url
        ));
        while let Some(line) = self.line(&mut lines).await {
            let line = line.trim();
            let said = match line.split_once(' ').unwrap_or((line, "")) {
                ("", _) => continue,
                ("/quit" | "/exit", _) => break,
                ("/reset", _) => {
                    self.messages.clear();
                    Ok(())
                }
                ("/models", _) => self.show_models().await,
                ("/model", name) => self.switch(name.trim()).await,
                (word, _) if word.starts_with('/') => {
                    say(&format!(
                        "{word} is unknown; there are /model NAME, /models, /reset, /quit\n"
                    ));
                    Ok(())
                }
                _ => self.ask(line).await,
            };
            if let Err(e) = said {
                if !std::io::stdin().is_terminal() {
                    return Err(e);
                }
                eprintln!("error: {}", terminal::on_terminal(&e.message));
            }
        }
        Ok(())
    }

    /// The next line typed; `None` at the end of input or at Ctrl-C.
    async fn line(&self, lines: &mut mpsc::Receiver<String>) -> Option<String> {
        if std::io::stdin().is_terminal() {
            say(&format!("{}> ", self.model));
        }
        tokio::select! {
            line = lines.recv() => line,
            _ = tokio::signal::ctrl_c() => None,
        }
    }

    async fn show_models(&self) -> Result<()> {
        for id in self.client.models().await? {
            say(&format!("{} {id}\n", if id == self.model { "*" } else { " " }));
        }
        Ok(())
    }

    async fn switch(&mut self, name: &str) -> Result<()> {
        if name.is_empty() {
            return self.show_models().await;
        }
        // Asked of the server, not of the list: `name@version` and `base:adapter` are names too.
        let route = format!("/v1/models/{name}");
        self.client.json(self.client.request(Method::GET, &route)).await?;
        self.model = name.to_owned();
        Ok(())
    }

    /// Streams the answer to stdout. The question stays in the conversation only if it was
    /// answered.
    async fn ask(&mut self, question: &str) -> Result<()> {
        self.messages.push(json!({"role": "user", "content": question}));
        let answer = self.answer().await;
        match &answer {
            Ok(text) => self.messages.push(json!({"role": "assistant", "content": text})),
            Err(_) => drop(self.messages.pop()),
        }
        answer.map(drop)
    }

    async fn answer(&self) -> Result<String> {
        let system = self.system.iter().map(|s| json!({"role": "system", "content": s}));
        let messages: Vec<Value> = system.chain(self.messages.iter().cloned()).collect();
        let mut body = json!({
            "model": self.model, "messages": messages,
            "stream": true, "max_tokens": self.max_tokens,
        });
        if let Some(t) = self.temperature {
            body["temperature"] = json!(t);
        }
        let request = self.client.request(Method::POST, "/v1/chat/completions").json(&body);
        let mut events = self.client.events(request).await?;
        let mut text = String::new();
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                _ = tokio::signal::ctrl_c() => {
                    say(" …\n");
                    return Ok(text); // dropping the stream cancels it
                }
            };
            let event = event.inspect_err(|_| {
                if !text.is_empty() {
                    say("\n")
                }
            })?;
            let Some(event) = event else { break };
            if let Some(piece) = event["choices"][0]["delta"]["content"].as_str() {
                say(piece);
                text += piece;
            }
        }
        say("\n");
        Ok(text)
    }
}

/// Lines of stdin, read on a thread of their own: a runtime would wait at its end for a read that
/// never returns.
fn typed_lines() -> mpsc::Receiver<String> {
    let (send, receive) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(std::result::Result::ok) {
            if send.blocking_send(line).is_err() {
                break;
            }
        }
    });
    receive
}
