//! Hands libFuzzer's inputs to `clamcast_fuzz::header`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    clamcast_fuzz::header(bytes);
});
