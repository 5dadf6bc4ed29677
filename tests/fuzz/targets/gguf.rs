//! See `bodies::gguf_file`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| polylora_fuzz::bodies::gguf_file(data));
