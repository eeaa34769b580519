//! Hands libFuzzer's inputs to `clamcast_fuzz::key_set`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    clamcast_fuzz::key_set(bytes);
});
