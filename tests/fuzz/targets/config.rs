//! See `support::fuzz::config`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| support::fuzz::config(data));
