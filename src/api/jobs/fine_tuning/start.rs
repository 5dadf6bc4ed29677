//! What a training job goes on from: the base, or a version of an adapter.
//!
//! Owns which versions can be trained further. Never reads a factor for long: the job does.

use crate::access::Caller;
use crate::adapters::registry::PinnedSource;
use crate::api::Api;
use crate::api::http::errors::invalid_value;
use crate::api::wire::LoraFields;
use crate::blocking::blocking;
use crate::error::{Error, Result, brief};
use crate::train::Asked;

/// The version that `model` means, kept, and what is asked for with its shape; the base is no
/// version. Errors: those of a request for `model`; `model_not_trainable`, `incompatible_start`;
/// `invalid_value` for a field that says otherwise.
pub async fn start(
    api: &Api,
    caller: &Caller,
    (model, lora): (&str, Option<&LoraFields>),
    asked: Asked,
) -> Result<(Option<PinnedSource>, Asked)> {
    let at = |e: Error| e.param("model");
    let Some(entry) = api.look_up(caller, model).map_err(at)? else { return Ok((None, asked)) };
    if entry.version.summary.chat_template {
        let message = format!(
            "`{}` has a chat template of its own, which training does not render; train on the \
             base `{}`, or on an adapter without one",
            brief(model),
            api.base_name
        );
        return Err(at(Error::invalid("model_not_trainable", message)));
    }
    let kept = api.registry.keep(&entry.version.name, entry.version.number).map_err(at)?;
    let registry = api.registry.clone();
    let open = move || {
        let asked = asked.shaped_like(&registry.open_factors(&kept)?)?;
        Ok((kept, asked))
    };
    let (kept, asked) = blocking(open).await.map_err(at)?;
    lora.map_or(Ok(()), |lora| agreed(lora, &asked))?;
    Ok((Some(kept), asked))
}

/// Whether what the client says of the shape is what the adapter has.
fn agreed(lora: &LoraFields, asked: &Asked) -> Result<()> {
    let is = |what: &str| format!("the adapter that the job goes on from {what}");
    if lora.r.is_some_and(|rank| rank != asked.rank) {
        return Err(invalid_value("polylora.r", is(&format!("has rank {}", asked.rank))));
    }
    if lora.use_dora.is_some_and(|dora| dora != asked.dora) {
        let what = if asked.dora { "is DoRA" } else { "has no magnitudes" };
        return Err(invalid_value("polylora.use_dora", is(what)));
    }
    for (name, said) in [
        ("lora_alpha", lora.lora_alpha.is_some()),
        ("use_rslora", lora.use_rslora.is_some()),
        ("target_modules", lora.target_modules.is_some()),
        ("init_lora_weights", lora.init_lora_weights.is_some()),
    ] {
        if said {
            return Err(invalid_value(&format!("polylora.{name}"), is("says this; leave it out")));
        }
    }
    Ok(())
}
