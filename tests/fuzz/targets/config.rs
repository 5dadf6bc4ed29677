//! See `bodies::config`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| polylora_fuzz::bodies::config(data));
