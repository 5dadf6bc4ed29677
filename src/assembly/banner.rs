//! What `serve` prints once it listens: what runs, and three things to paste.
//!
//! Owns that page. Never asks anything of the server. The thing to know: every line of it is meant
//! to be pasted as it stands into the terminal beside.

use crate::adapters::version::{Entry, State};

/// What is to be said.
pub struct Banner<'a> {
    pub url: &'a str,
    pub base: &'a str,
    pub device: &'a str,
    /// GPUs that were found and are not used.
    pub gpus: &'a [String],
    pub storage: &'a str,
    pub context: usize,
    pub adapters: &'a [Entry],
    /// How the binary was called.
    pub program: &'a str,
    pub locked: bool,
}

impl Banner<'_> {
    pub fn page(&self) -> String {
        let Self { url, base, storage, context, .. } = self;
        let device = self.device();
        let version = env!("CARGO_PKG_VERSION");
        let asked = self.example();
        let (header, key, variable) = if self.locked {
            (
                " \\\n  -H \"Authorization: Bearer $POLYLORA_API_KEY\"",
                "os.environ[\"POLYLORA_API_KEY\"]",
                "import os\n",
            )
        } else {
            ("", "\"none\"", "")
        };
        format!(
            "
polylora {version} at {url}
  model     {base}, context {context}
  weights   {storage}
  device    {device}
  adapters  {}

Ask it:

curl {url}/v1/chat/completions -H 'Content-Type: application/json'{header} \\
  -d '{{\"model\": \"{asked}\", \"temperature\": 0,
       \"messages\": [{{\"role\": \"user\", \"content\": \"What is a bicycle?\"}}]}}'

The same with OpenAI's Python package (pip install openai):

python3 - <<'END'
{variable}from openai import OpenAI
client = OpenAI(base_url=\"{url}/v1\", api_key={key})
for part in client.chat.completions.create(
    model=\"{asked}\", temperature=0, stream=True,
    messages=[{{\"role\": \"user\", \"content\": \"What is a bicycle?\"}}],
):
    print(part.choices[0].delta.content or \"\" if part.choices else \"\", end=\"\", flush=True)
print()
END

Or chat:

{} chat --url {url} --model-name {asked} --temperature 0

Or train one, while it serves, on a file of examples:

{} jobs create FILE.jsonl --url {url} --name NAME --watch

",
            self.list(),
            self.program,
            self.program
        )
    }

    /// The model that the examples ask: an adapter that answers, one given at the start before
    /// others; else the base.
    fn example(&self) -> &str {
        let ready = || self.adapters.iter().filter(|e| e.current && e.state == State::Ready);
        let asked = ready().find(|e| e.version.lineage.is_of_start()).or(ready().next());
        asked.map_or(self.base, |e| e.version.name.as_str())
    }

    fn device(&self) -> String {
        match self.gpus {
            [] => self.device.to_owned(),
            gpus => format!("{} (not used by this version: {})", self.device, gpus.join(", ")),
        }
    }

    fn list(&self) -> String {
        let current = self.adapters.iter().filter(|e| e.current);
        let shown: Vec<String> = current
            .map(|e| {
                let v = &e.version;
                let note = match e.state {
                    State::Ineffective => ", ineffective: changes nothing, not served",
                    _ => "",
                };
                format!("{} ({}, rank {}{note})", v.id(), v.summary.method, v.summary.rank_max)
            })
            .collect();
        match shown.is_empty() {
            true => format!("none; add one: {} adapter push NAME DIR", self.program),
            false => shown.join(", "),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_that_are_not_used_are_named() {
        let mut banner = Banner {
            url: "http://127.0.0.1:8080",
            base: "base",
            device: "cpu: 2 threads, avx2",
            gpus: &[],
            storage: "bf16",
            context: 64,
            adapters: &[],
            program: "polylora",
            locked: false,
        };
        assert!(banner.page().contains("\n  device    cpu: 2 threads, avx2\n"));
        let gpus = ["NVIDIA L4".to_owned(), "NVIDIA T4".to_owned()];
        banner.gpus = &gpus;
        let line = "cpu: 2 threads, avx2 (not used by this version: NVIDIA L4, NVIDIA T4)\n";
        assert!(banner.page().contains(line), "{}", banner.page());
    }
}
