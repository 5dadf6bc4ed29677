//! See `support::fuzz::gguf_file`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| support::fuzz::gguf_file(data));
