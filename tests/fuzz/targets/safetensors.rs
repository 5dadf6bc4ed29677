//! See `support::fuzz::safetensors`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| support::fuzz::safetensors(data));
