//! The series under vLLM's names, for gateways that route by them.
//!
//! Owns the translation. Never counts anything itself. The thing to know: a gateway chooses the
//! server whose `running_lora_adapters` or `lora_adapter_loaded` names the adapter of a request, so
//! these lists are of activity and of residency, and nothing is rounded.

use prometheus::proto::{Gauge, LabelPair, Metric, MetricFamily, MetricType};

/// Ours and vLLM's name of the same figure.
const SAME: [(&str, &str); 13] = [
    ("polylora_requests_running", "vllm:num_requests_running"),
    ("polylora_requests_waiting", "vllm:num_requests_waiting"),
    ("polylora_preemptions_total", "vllm:num_preemptions_total"),
    ("polylora_prefix_cache_queries_tokens_total", "vllm:prefix_cache_queries_total"),
    ("polylora_prefix_cache_hits_tokens_total", "vllm:prefix_cache_hits_total"),
    ("polylora_prompt_tokens_total", "vllm:prompt_tokens_total"),
    ("polylora_generation_tokens_total", "vllm:generation_tokens_total"),
    ("polylora_time_to_first_token_seconds", "vllm:time_to_first_token_seconds"),
    ("polylora_inter_token_latency_seconds", "vllm:inter_token_latency_seconds"),
    ("polylora_request_queue_time_seconds", "vllm:request_queue_time_seconds"),
    ("polylora_step_rows", "vllm:iteration_tokens_total"),
    ("polylora_kv_pages_used", "vllm:kv_cache_usage_perc"),
    ("polylora_requests_finished_total", "vllm:request_success_total"),
];

/// A resident adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    pub name: String,
    pub pinned: bool,
}

/// What gateways want to know beyond our own series, at the moment of a scrape.
#[derive(Debug, Clone, Default)]
pub struct Gateway {
    /// Served name of the base.
    pub model: String,
    /// Slots of the bank.
    pub slots_max: usize,
    /// Names with a request in a step, and in the queue.
    pub running: Vec<String>,
    pub waiting: Vec<String>,
    /// In the bank, ready to compute with: vLLM's level `gpu`, whatever the device is.
    pub loaded: Vec<Loaded>,
    /// Tokens of a KV page.
    pub page_tokens: usize,
    /// Unix seconds.
    pub now: f64,
}

impl Gateway {
    /// The families, from ours.
    pub(super) fn families(&self, ours: &[MetricFamily]) -> Vec<MetricFamily> {
        let find = |name: &str| ours.iter().find(|family| family.name() == name);
        let pages = find("polylora_kv_pages_total").map_or(0.0, first_gauge);
        let mut families: Vec<_> = SAME
            .iter()
            .filter_map(|(our, their)| Some(self.renamed(find(our)?, their, pages)))
            .collect();
        families.extend(self.adapters());
        let config = [
            ("block_size", self.page_tokens.to_string()),
            ("num_gpu_blocks", format!("{pages:.0}")),
        ];
        families.push(family("vllm:cache_config_info", "KV memory.", vec![gauge(&config, 1.0)]));
        families
    }

    fn renamed(&self, ours: &MetricFamily, name: &str, pages: f64) -> MetricFamily {
        let mut theirs = ours.clone();
        theirs.set_name(name.to_owned());
        for metric in theirs.mut_metric() {
            let mut labels = metric.take_label();
            labels.push(label("model_name", &self.model));
            metric.set_label(labels);
            if name.ends_with("usage_perc") {
                // A share from 0 to 1, for all its name.
                let used = metric.get_gauge().get_value();
                metric.set_gauge(value(if pages > 0.0 { used / pages } else { 0.0 }));
            }
        }
        if name.ends_with("request_success_total") {
            let ended_well = |m: &Metric| {
                let reason = m.get_label().iter().find(|l| l.name() == "finished_reason");
                reason.is_some_and(|l| ["stop", "length"].contains(&l.value()))
            };
            theirs.mut_metric().retain(ended_well);
        }
        theirs
    }

    fn adapters(&self) -> Vec<MetricFamily> {
        let info = [
            ("max_lora", self.slots_max.to_string()),
            ("running_lora_adapters", self.running.join(",")),
            ("waiting_lora_adapters", self.waiting.join(",")),
        ];
        let resident = self.loaded.iter().map(|adapter| {
            let labels = [
                ("adapter_name", adapter.name.clone()),
                ("level", "gpu".to_owned()),
                ("pinned", adapter.pinned.to_string()),
            ];
            gauge(&labels, 1.0)
        });
        let count = |n: usize| vec![gauge(&[], n as f64)];
        vec![
            family(
                "vllm:lora_requests_info",
                "Adapters with requests; the value is the time.",
                vec![gauge(&info, self.now)],
            ),
            family("vllm:lora_adapter_loaded", "Adapters in memory.", resident.collect()),
            family("vllm:num_gpu_loaded_lora_adapters", "In the bank.", count(self.loaded.len())),
            family(
                "vllm:num_cpu_loaded_lora_adapters",
                "In memory, but not ready to compute with: there is no such tier.",
                count(0),
            ),
        ]
        .into_iter()
        .filter(|family| !family.get_metric().is_empty())
        .collect()
    }
}

fn first_gauge(family: &MetricFamily) -> f64 {
    family.get_metric().first().map_or(0.0, |m| m.get_gauge().get_value())
}

fn family(name: &str, help: &str, metrics: Vec<Metric>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(name.to_owned());
    family.set_help(help.to_owned());
    family.set_field_type(MetricType::GAUGE);
    family.set_metric(metrics);
    family
}

fn gauge(labels: &[(&str, String)], number: f64) -> Metric {
    let mut metric = Metric::from_gauge(value(number));
    metric.set_label(labels.iter().map(|(name, value)| label(name, value)).collect());
    metric
}

fn value(number: f64) -> Gauge {
    let mut gauge = Gauge::default();
    gauge.set_value(number);
    gauge
}

fn label(name: &str, value: &str) -> LabelPair {
    let mut label = LabelPair::default();
    label.set_name(name.to_owned());
    label.set_value(value.to_owned());
    label
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;

    #[test]
    fn gateways_read_the_lines_that_they_would_read_from_vllm() {
        let metrics = Metrics::new();
        metrics.requests_running.set(2);
        metrics.requests_waiting.set(3);
        metrics.kv_pages_total.set(8);
        metrics.kv_pages_used.set(2);
        for reason in ["stop", "failed"] {
            metrics.requests_finished.with_label_values(&[reason]).inc();
        }
        let adapter = |name: &str, pinned| Loaded { name: name.to_owned(), pinned };
        let page = metrics.render(&Gateway {
            model: "org/\"base\"".to_owned(),
            slots_max: 4,
            running: vec!["a".to_owned(), "b".to_owned()],
            waiting: vec!["c".to_owned()],
            loaded: vec![adapter("a", true), adapter("b", false)],
            page_tokens: 16,
            now: 1_700_000_000.5,
        });
        let model = "model_name=\"org/\\\"base\\\"\"";
        for line in [
            &format!("vllm:num_requests_running{{{model}}} 2"),
            &format!("vllm:num_requests_waiting{{{model}}} 3"),
            &format!("vllm:kv_cache_usage_perc{{{model}}} 0.25"),
            &format!("vllm:request_success_total{{finished_reason=\"stop\",{model}}} 1"),
            "vllm:lora_requests_info{max_lora=\"4\",running_lora_adapters=\"a,b\",\
             waiting_lora_adapters=\"c\"} 1700000000.5",
            "vllm:lora_adapter_loaded{adapter_name=\"a\",level=\"gpu\",pinned=\"true\"} 1",
            "vllm:lora_adapter_loaded{adapter_name=\"b\",level=\"gpu\",pinned=\"false\"} 1",
            "vllm:num_gpu_loaded_lora_adapters 2",
            "vllm:num_cpu_loaded_lora_adapters 0",
            "vllm:cache_config_info{block_size=\"16\",num_gpu_blocks=\"8\"} 1",
            "# TYPE vllm:time_to_first_token_seconds histogram",
        ] {
            assert!(page.lines().any(|l| l == line), "{line} is not in\n{page}");
        }
        assert!(!page.contains("vllm:request_success_total{finished_reason=\"failed\""));
    }
}
