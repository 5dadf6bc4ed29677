//! Settings of devices and dtypes in the kernels' words, and back.
//!
//! Owns the pairs. Never decides what `auto` comes to, but says that nobody chose. The thing to
//! know: the settings were checked when they were read.

use crate::config::{Config, Storage, WeightStorage};
use crate::model::weights::Weights;
use polylora_kernels::{DeviceChoice, Dtype, FactorDtype, KvDtype, WeightDtype};

/// As the setting has it.
pub fn device_name(place: DeviceChoice) -> String {
    match place {
        DeviceChoice::Auto => "auto".to_owned(),
        DeviceChoice::Cpu => "cpu".to_owned(),
        DeviceChoice::Cuda(n) => format!("cuda:{n}"),
    }
}

pub fn factor_dtype(config: &Config, weights: Dtype) -> FactorDtype {
    match config.adapter_dtype {
        Storage::Auto => weights.into(),
        Storage::F32 => FactorDtype::F32,
        Storage::Bf16 => FactorDtype::Bf16,
        Storage::Int8 => FactorDtype::Int8,
    }
}

/// `None`: the weights' own.
pub fn kv_dtype(config: &Config) -> Option<KvDtype> {
    match config.kv_dtype {
        Storage::Auto => None,
        Storage::F32 => Some(KvDtype::F32),
        Storage::Bf16 => Some(KvDtype::Bf16),
        Storage::Int8 => Some(KvDtype::Int8),
    }
}

/// `None`: as the checkpoint has them.
pub fn weight_dtype(config: &Config) -> Option<WeightDtype> {
    match config.dtype {
        WeightStorage::Auto => None,
        WeightStorage::F32 => Some(WeightDtype::F32),
        WeightStorage::Bf16 => Some(WeightDtype::Bf16),
        WeightStorage::Q8 => Some(WeightDtype::Int8),
        WeightStorage::Q4 => Some(WeightDtype::Int4Min),
    }
}

/// For people: `int4 and int8`.
pub fn dtype_names(weights: &Weights) -> String {
    let mut names: Vec<&str> = Vec::new();
    for dtype in weights.dtypes() {
        let name = match dtype {
            WeightDtype::F32 => "f32",
            WeightDtype::Bf16 => "bf16",
            WeightDtype::Int8 | WeightDtype::Int8By16 | WeightDtype::Int8Min => "int8",
            WeightDtype::Int4 | WeightDtype::Int4Min => "int4",
        };
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names.join(" and ")
}
