//! The rules of a rollout hold whatever goes wrong, and everybody comes to rest when it is over.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::{env, panic, thread};

use clamcast_tests::long;
use clamcast_tests::simulation::{Report, Size, run};

/// Runs these seeds, or the one that `CLAMCAST_SEED` names.
fn check(seeds: Range<u64>, size: Size) {
    if let Some(seed) = named() {
        println!("{:#?}", run(seed, size));
        return;
    }
    let next = AtomicU64::new(seeds.start);
    let next = || Some(next.fetch_add(1, Ordering::Relaxed)).filter(|seed| seeds.contains(seed));
    let worker = || -> Vec<Report> {
        let mut reports = Vec::new();
        while let Some(seed) = next() {
            reports.push(run(seed, size));
        }
        reports
    };
    let reports: Vec<_> = thread::scope(|scope| {
        let workers = thread::available_parallelism().map_or(1, usize::from);
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(worker)).collect();
        let reports = workers.into_iter().map(|worker| worker.join());
        reports
            .flat_map(|reports| reports.unwrap_or_else(|panic| panic::resume_unwind(panic)))
            .collect()
    });
    let sum = |of: fn(&Report) -> u64| reports.iter().map(of).sum::<u64>();
    let (completed, halted) = (sum(|it| it.completed), sum(|it| it.halted));
    let promises = sum(|it| it.promises);
    println!(
        "{} events, {} offers, {completed} rollouts complete, {halted} halted, {promises} good \
         generations live on all honest hosts in time, {} crashes of the master, {} of hosts",
        sum(|it| it.events),
        sum(|it| it.offers),
        sum(|it| it.master_crashes),
        sum(|it| it.host_crashes),
    );
    let seeds = reports.len() as u64;
    assert!(
        completed > seeds && halted > seeds && (!size.only_lies || promises > seeds),
        "too little was put to the test"
    );
}

/// The seed that `CLAMCAST_SEED` names.
fn named() -> Option<u64> {
    let seed = env::var("CLAMCAST_SEED").ok()?;
    Some(seed.parse().expect("CLAMCAST_SEED is a number"))
}

#[test]
fn the_rules_hold_and_everybody_comes_to_rest() {
    check(0..200, Size::SMALL);
}

#[test]
fn the_rules_hold_over_a_thousand_seeds() {
    long!();
    check(200..1200, Size::SMALL);
}

#[test]
fn no_lying_minority_stops_or_misleads_a_rollout() {
    check(0..100, Size::LIARS);
}

#[test]
fn no_lying_minority_stops_or_misleads_a_rollout_over_a_thousand_seeds() {
    long!();
    check(100..1200, Size::LIARS);
}

#[test]
fn one_seed_is_always_the_same_run() {
    assert_eq!(run(7, Size::SMALL), run(7, Size::SMALL));
}

#[test]
fn a_hundred_thousand_agents() {
    long!();
    let report = run(named().unwrap_or(1), Size::LARGE);
    println!("{report:#?}");
    let hosts = Size::LARGE.hosts as u64;
    assert!(
        report.completed > 0 && report.offers > hosts,
        "too little was put to the test"
    );
}
