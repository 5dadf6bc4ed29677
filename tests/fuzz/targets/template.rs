//! See `bodies::template`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| polylora_fuzz::bodies::template(data));
