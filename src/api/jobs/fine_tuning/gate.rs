//! From the fields of a job to what its result must hold before its name moves.
//!
//! Owns the bounds of these fields. Never judges. The thing to know: a threshold that could not be
//! measured is refused when the job comes in, not when it is trained.

use crate::api::http::errors::invalid_value;
use crate::api::wire::{FineTuningFields, GateFields};
use crate::error::Result;
use crate::jobs::Gate;

/// Largest share of a file that is held out.
const SPLIT_MAX: f64 = 0.5;

/// Share of the training file that is held out, and the gate. Errors: `invalid_value`, with the
/// field's path.
pub fn gate(fields: &FineTuningFields, is_dpo: bool) -> Result<(Option<f64>, Gate)> {
    let ours = fields.polylora.as_ref();
    let split = ours.and_then(|ours| ours.validation_split);
    let wrong = |message: String| Err(invalid_value("polylora.validation_split", message));
    match split {
        Some(share) if !(share > 0.0 && share <= SPLIT_MAX) => {
            return wrong(format!("{share} is not above 0 and at most {SPLIT_MAX}"));
        }
        Some(_) if fields.validation_file.is_some() => {
            return wrong("there is a `validation_file` already".to_owned());
        }
        _ => {}
    }
    let plain = GateFields::default();
    let given = ours.and_then(|ours| ours.gate.as_ref()).unwrap_or(&plain);
    let gate = Gate {
        max_valid_loss: least("max_valid_loss", given.max_valid_loss, f64::MAX)?,
        max_loss_ratio_to_base: least(
            "max_loss_ratio_to_base",
            given.max_loss_ratio_to_base,
            f64::MAX,
        )?,
        min_exact_match: least("min_exact_match", given.min_exact_match, 1.0)?,
        max_negative_flips: given.max_negative_flips,
        must_beat_current: given.must_beat_current,
    };
    if !gate.is_open() && split.is_none() && fields.validation_file.is_none() {
        let message = "a gate needs examples to measure by: a `validation_file`, or \
                       `polylora.validation_split`";
        return Err(invalid_value("polylora.gate", message));
    }
    let of_answers = [
        ("min_exact_match", gate.min_exact_match.is_some()),
        ("max_negative_flips", gate.max_negative_flips.is_some()),
    ];
    if let Some((name, _)) = of_answers.iter().find(|(_, is_set)| is_dpo && *is_set) {
        let message = format!("`{name}` is not measured of pairs: the method is dpo");
        return Err(invalid_value(&format!("polylora.gate.{name}"), message));
    }
    Ok((split, gate))
}

/// From 0 to `max`.
fn least(name: &str, given: Option<f64>, max: f64) -> Result<Option<f64>> {
    match given {
        Some(n) if !(0.0..=max).contains(&n) => {
            let most = if max < f64::MAX { format!(" and at most {max}") } else { String::new() };
            let message = format!("{n} is not at least 0{most}");
            Err(invalid_value(&format!("polylora.gate.{name}"), message))
        }
        given => Ok(given),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn of(validation: Value, ours: Value, is_dpo: bool) -> Result<(Option<f64>, Gate)> {
        let fields = json!({"model": "base", "training_file": "file-1",
                            "validation_file": validation, "polylora": ours});
        gate(&serde_json::from_value(fields).expect("fields"), is_dpo)
    }

    #[test]
    fn what_could_not_be_measured_is_refused_by_name() {
        let file = json!("file-2");
        let all = json!({"max_valid_loss": 1.5, "max_loss_ratio_to_base": 0.9,
                         "min_exact_match": 0.5, "max_negative_flips": 0,
                         "must_beat_current": true});
        let gate = json!({"gate": all});
        assert!(of(file.clone(), gate.clone(), false).is_ok());
        let split = json!({"gate": all, "validation_split": 0.1});
        assert_eq!(of(Value::Null, split.clone(), false).unwrap().0, Some(0.1));
        assert!(of(Value::Null, json!({"gate": {"must_beat_current": false}}), false).is_ok());
        let of_gate = |name: &str, value: Value| json!({"gate": {name: value}});
        for (validation, ours, is_dpo, param) in [
            (Value::Null, gate, false, "polylora.gate"),
            (file.clone(), split, false, "polylora.validation_split"),
            (Value::Null, json!({"validation_split": 0.6}), false, "polylora.validation_split"),
            (Value::Null, json!({"validation_split": 0.0}), false, "polylora.validation_split"),
            (
                file.clone(),
                of_gate("max_valid_loss", json!(-1)),
                false,
                "polylora.gate.max_valid_loss",
            ),
            (
                file.clone(),
                of_gate("min_exact_match", json!(1.5)),
                false,
                "polylora.gate.min_exact_match",
            ),
            (
                file.clone(),
                of_gate("min_exact_match", json!(0.5)),
                true,
                "polylora.gate.min_exact_match",
            ),
            (
                file,
                of_gate("max_negative_flips", json!(3)),
                true,
                "polylora.gate.max_negative_flips",
            ),
        ] {
            let error = of(validation, ours.clone(), is_dpo).expect_err("it is refused");
            assert_eq!(error.param.as_deref(), Some(param), "{ours}: {error}");
        }
    }
}
