//! See `support::fuzz::request`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| support::fuzz::request(data));
