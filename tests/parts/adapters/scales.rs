//! Which scale and rank each module gets from the config.

use super::{golden, with};
use polylora::adapters::format::config::PeftConfig;
use serde_json::json;
use std::path::Path;
use support::files::Files;

fn config_of(dir: &Path) -> PeftConfig {
    PeftConfig::parse(&std::fs::read(dir.join("adapter_config.json")).unwrap()).unwrap()
}

#[test]
fn blurb_has_the_scales_of_its_patterns_in_file_order() {
    let config = config_of(&golden("blurb"));
    let scale = |path: String| config.scale(&path).unwrap();
    for l in 0..30 {
        let at = |module: &str| format!("model.layers.{l}.{module}");
        assert_eq!(scale(at("self_attn.v_proj")), if l == 29 { 0.5 } else { 1.0 });
        assert_eq!(scale(at("self_attn.q_proj")), 4.0);
        assert_eq!(scale(at("mlp.down_proj")), if l < 3 { 8.0 } else { 2.0 });
        assert_eq!(config.rank_of(&at("mlp.down_proj")).unwrap(), if l < 3 { 2 } else { 8 });
    }
}

#[test]
fn the_first_pattern_in_file_order_wins() {
    let base = Files::plain(1).config;
    let text = |order: &str| with(&base, serde_json::from_str(order).unwrap()).to_string();
    let scale = |json: String| {
        let config = PeftConfig::parse(json.as_bytes()).unwrap();
        config.scale("model.layers.0.self_attn.q_proj").unwrap()
    };
    let narrow_first = r#"{"alpha_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 20}}"#;
    let wide_first = r#"{"alpha_pattern": {"q_proj": 20, "layers.0.self_attn.q_proj": 2}}"#;
    assert_eq!(scale(text(narrow_first)), 1.0);
    assert_eq!(scale(text(wide_first)), 10.0);
    let no_part_of_a_name = r#"{"alpha_pattern": {"_proj": 20}}"#;
    assert_eq!(scale(text(no_part_of_a_name)), 2.0);
}

#[test]
fn rslora_divides_by_the_root_of_the_rank() {
    let mut files = Files::plain(1);
    files.set("use_rslora", json!(true)).set("r", json!(16)).set("lora_alpha", json!(8));
    let config = PeftConfig::parse(files.config.to_string().as_bytes()).unwrap();
    assert_eq!(config.scale("model.layers.0.self_attn.q_proj").unwrap(), 2.0);
}
