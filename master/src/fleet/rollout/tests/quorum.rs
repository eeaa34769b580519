//! No single host, and no lying minority, stops or misleads a rollout.

use super::*;

/// Hosts `h0`, `h1`, ... with these numbers of canaries and others of each version.
fn versions(waves: &[&str], of: &[(&'static str, usize, usize)]) -> Lab {
    let (canaries, others) = of.iter().fold((0, 0), |(canaries, others), of| {
        (canaries + of.1, others + of.2)
    });
    let mut lab = Lab::new(canaries + others, canaries, waves);
    let canaries = of.iter().flat_map(|of| std::iter::repeat_n(of.0, of.1));
    let others = of.iter().flat_map(|of| std::iter::repeat_n(of.0, of.2));
    for (number, version) in canaries.chain(others).enumerate() {
        lab.host(&format!("h{number}")).version = Some(version);
    }
    lab.published(1).everybody(1, LIVE);
    lab.noted.clear();
    lab
}

/// 3 canaries and 7 others of one version.
fn ten() -> Lab {
    versions(&["group:canary", "100%"], &[("1.4", 3, 7)])
}

impl Lab {
    fn set_aside(&self) -> Vec<String> {
        let hosts = self.rollout.set_aside().keys();
        hosts.map(AgentName::to_string).collect()
    }

    fn withheld(&self) -> Vec<&str> {
        let run = self.rollout.running();
        let withheld = run.into_iter().flat_map(|run| run.withheld.keys());
        withheld.map(String::as_str).collect()
    }
}

#[test]
fn a_lone_refusal_is_outweighed_and_its_host_set_aside() {
    let mut lab = ten();
    lab.published(2).say("h0", 2, Answer::Refused);
    lab.is("complete 1, running 2 wave 1 of 2");
    lab.say("h1", 2, LIVE)
        .is("complete 1, running 2 wave 1 of 2");
    lab.say("h2", 2, LIVE)
        .is("complete 1, running 2 wave 2 of 2");
    assert_eq!(lab.set_aside(), ["h0"]);
    lab.everybody(2, LIVE).is("complete 2");
    assert_eq!(
        lab.noted,
        [
            "rollout 2",
            "wave 2",
            "weighing 2",
            "set-aside h0",
            "wave 2",
            "rollout-complete 2"
        ]
    );
}

#[test]
fn a_refusal_stops_offers_to_other_versions_until_its_own_has_answered() {
    let of = [("1.0", 2, 0), ("1.4", 3, 7)];
    let mut lab = versions(&["group:canary", "100%"], &of);
    lab.host("h0").away = true;
    lab.host("h0").seen = lab.now - 60;
    lab.published(2);
    lab.host("h4").offered.clear(); // its offer is lost
    lab.host("h0").away = false;
    lab.say("h2", 2, Answer::Refused);
    let offered = |lab: &mut Lab, name: &str| lab.host(name).offered.contains_key(&2);
    assert!(offered(&mut lab, "h4"), "it must be able to answer");
    assert!(!offered(&mut lab, "h0"));
    lab.say("h3", 2, LIVE)
        .is("complete 1, running 2 wave 1 of 2");
    lab.say("h4", 2, LIVE);
    assert_eq!(lab.set_aside(), ["h2"]);
    assert!(offered(&mut lab, "h0"));
}

#[test]
fn a_refusal_is_not_judged_while_the_others_of_its_version_are_disconnected_for_a_moment() {
    let mut lab = ten();
    lab.published(2);
    for name in ["h1", "h2"] {
        lab.host(name).away = true;
        lab.host(name).seen = lab.now;
    }
    lab.say("h0", 2, Answer::Refused)
        .is("complete 1, running 2 wave 1 of 2");
    for name in ["h1", "h2"] {
        lab.host(name).away = false;
        lab.say(name, 2, LIVE);
    }
    assert_eq!(lab.set_aside(), ["h0"]);
}

#[test]
fn a_restart_or_a_pause_of_an_operator_takes_no_time_from_the_others_of_a_version() {
    let mut lab = ten();
    lab.published(2).say("h0", 2, Answer::Refused);
    lab.order(|lab, now| lab.rollout.pause("lunch".into(), now));
    lab.wait(3 * DEADLINE).say("h1", 2, LIVE);
    lab.is("complete 1, running 2 wave 1 of 2, paused Operator");
    lab.resume().unwrap();
    lab.step().is("complete 1, running 2 wave 1 of 2");
    let kept = serde_json::to_string(&lab.rollout).unwrap();
    lab.now += DEADLINE - 10;
    lab.rollout = serde_json::from_str(&kept).unwrap();
    lab.rollout.resumed(at(lab.now));
    lab.step().is("complete 1, running 2 wave 1 of 2");
    lab.say("h2", 2, LIVE);
    assert_eq!(lab.set_aside(), ["h0"]);
}

#[test]
fn a_wave_whose_members_may_not_be_offered_the_generation_is_skipped() {
    let mut lab = versions(&["group:canary", "100%"], &[("1.0", 1, 5), ("1.4", 1, 0)]);
    lab.published(2).say("h0", 2, Answer::Refused);
    assert_eq!(lab.withheld(), ["1.0"]);
    lab.say("h1", 2, LIVE).is("complete 2");
    assert_eq!(lab.offered(2), 2);
    // Or a wave that has become so.
    let mut lab = versions(&["group:canary", "100%"], &[("1.4", 3, 0), ("1.0", 0, 4)]);
    lab.published(2);
    for name in ["h0", "h1", "h2"] {
        lab.say(name, 2, LIVE);
    }
    for name in ["h3", "h4", "h5", "h6"] {
        if lab.rollout.running().is_some() {
            lab.say(name, 2, Answer::Refused);
        }
    }
    lab.wait(DEADLINE).wait(DEADLINE);
    assert!(lab.rollout.running().is_none(), "{}", lab.state());
}

#[test]
fn liars_that_claim_live_do_not_carry_a_bad_generation_past_slow_canaries() {
    let mut lab = versions(&["group:canary", "100%"], &[("1.4", 5, 5)]);
    lab.published(2).say("h0", 2, LIVE).say("h1", 2, LIVE);
    lab.say("h2", 2, Answer::Refused).wait(DEADLINE);
    lab.is("complete 1, running 2 wave 1 of 2, paused Unwell");
    assert_eq!(lab.offered(2), 5);
    lab.say("h3", 2, Answer::Refused);
    lab.say("h4", 2, Answer::Refused)
        .is("complete 1, owes 1 for 2");
}

#[test]
fn a_host_that_contradicts_itself_is_set_aside_once() {
    let mut lab = ten();
    lab.published(2).say("h0", 2, Answer::Refused);
    lab.say("h1", 2, LIVE).say("h2", 2, LIVE);
    let noted = lab.noted.len();
    lab.wait(1).wait(1);
    assert_eq!(lab.noted.len(), noted, "{:?}", lab.noted);
}

#[test]
fn databases_that_come_again_are_withheld_until_their_rollout_is_complete() {
    let of = [("1.0", 1, 4), ("1.4", 3, 7)];
    let mut lab = versions(&["group:canary", "100%"], &of);
    lab.published(2)
        .say("h0", 2, Answer::Refused)
        .everybody(2, LIVE);
    lab.is("complete 2");
    let old: Vec<_> = lab
        .hosts
        .iter()
        .filter(|(_, host)| host.version == Some("1.0") && host.groups.is_empty())
        .map(|(name, _)| name.clone())
        .collect();
    assert_eq!(lab.wanted(&old[0]), Some(1));
    lab.publish(again(4, 2), false);
    lab.step();
    assert_eq!(
        lab.wanted(&old[0]),
        Some(1),
        "not before its canary has proven it"
    );
}

#[test]
fn weighing_waits_for_one_deadline_at_most() {
    let mut lab = versions(&["group:canary", "100%"], &[("1.4", 5, 5)]);
    lab.published(2).wait(60).say("h0", 2, Answer::Refused);
    lab.say("h1", 2, LIVE).say("h2", 2, LIVE);
    lab.is("complete 1, running 2 wave 1 of 2");
    let begun = lab.now;
    for name in ["h3", "h4"] {
        lab.host(name).offered.insert(2, (begun, begun + 800));
    }
    lab.wait(DEADLINE - 1)
        .is("complete 1, running 2 wave 1 of 2");
    assert!(lab.set_aside().is_empty());
    lab.wait(1);
    assert_eq!(lab.set_aside(), ["h0"]);
}

#[test]
fn a_bad_generation_ends_with_the_second_refusal_of_three_canaries() {
    let mut lab = ten();
    lab.published(2).say("h0", 2, Answer::Refused);
    lab.is("complete 1, running 2 wave 1 of 2");
    lab.say("h1", 2, Answer::Refused)
        .is("complete 1, owes 1 for 2");
    assert_eq!(lab.offered(2), 3);
    assert!(lab.set_aside().is_empty());
}

#[test]
fn a_liar_that_claims_live_does_not_save_a_bad_generation() {
    let mut lab = ten();
    lab.published(2)
        .say("h0", 2, LIVE)
        .say("h1", 2, Answer::Refused);
    lab.is("complete 1, running 2 wave 1 of 2");
    lab.say("h2", 2, Answer::Refused)
        .is("complete 1, owes 1 for 2");
}

#[test]
fn only_a_proof_by_a_real_clamd_counters_a_refusal() {
    let mut lab = ten();
    let weak = Answer::Live { proven: false };
    lab.published(2).say("h1", 2, weak).say("h2", 2, weak);
    lab.is("complete 1, running 2 wave 1 of 2"); // h0 is waited for
    lab.say("h0", 2, Answer::Refused)
        .is("complete 1, owes 1 for 2");
}

#[test]
fn a_generation_that_one_version_cannot_load_goes_on_to_the_others() {
    let of = [("1.0", 2, 4), ("1.4", 3, 7)];
    let mut lab = versions(&["group:canary", "100%"], &of);
    lab.published(2).say("h0", 2, Answer::Refused);
    lab.is("complete 1, running 2 wave 1 of 2");
    assert_eq!(
        lab.withheld(),
        ["1.0"],
        "two canaries can never outweigh one"
    );
    for name in ["h2", "h3", "h4"] {
        lab.say(name, 2, LIVE);
    }
    lab.is("complete 1, running 2 wave 2 of 2");
    lab.say("h1", 2, Answer::Refused).everybody(2, LIVE);
    lab.is("complete 2");
    assert_eq!(lab.offered(2), 5 + 7);
    let old = lab
        .hosts
        .iter()
        .find(|(_, host)| host.version == Some("1.0") && host.groups.is_empty());
    let old = old.unwrap().0.clone();
    assert_eq!(lab.wanted(&old), Some(1), "its last good one");
    // The next one is a new chance.
    lab.published(3).everybody(3, LIVE).is("complete 3");
    assert_eq!(lab.wanted(&old), Some(3));
}

#[test]
fn a_host_that_claims_a_version_of_its_own_stops_that_version_only() {
    let mut lab = ten();
    lab.host("h0").version = Some("9.9");
    lab.published(2).say("h0", 2, Answer::Refused);
    assert_eq!(lab.withheld(), ["9.9"]);
    lab.everybody(2, LIVE).is("complete 2");
}

#[test]
fn hosts_that_claim_versions_of_their_own_in_a_later_wave_halt_nothing() {
    let mut lab = versions(&["group:canary", "100%"], &[("1.4", 3, 9)]);
    for (host, version) in [("h5", "9.1"), ("h6", "9.2"), ("h7", "9.3")] {
        lab.host(host).version = Some(version);
    }
    lab.published(2);
    for name in ["h0", "h1", "h2"] {
        lab.say(name, 2, LIVE);
    }
    for name in ["h5", "h6", "h7"] {
        lab.say(name, 2, Answer::Refused);
    }
    lab.everybody(2, LIVE).is("complete 2");
}

#[test]
fn a_withheld_version_is_released_when_its_proofs_come_after_all() {
    let of = [("1.0", 3, 4), ("1.4", 3, 7)];
    let mut lab = versions(&["group:canary", "100%"], &of);
    lab.published(2).say("h0", 2, Answer::Refused);
    for name in ["h3", "h4", "h5"] {
        lab.say(name, 2, LIVE);
    }
    lab.wait(DEADLINE);
    assert_eq!(lab.withheld(), ["1.0"]);
    lab.say("h1", 2, LIVE).say("h2", 2, LIVE);
    assert_eq!(
        (lab.withheld(), lab.set_aside()),
        (vec![], vec!["h0".to_owned()])
    );
    lab.everybody(2, LIVE).is("complete 2");
    assert_eq!(lab.offered(2), 17);
}

#[test]
fn a_version_whose_canaries_are_silent_gets_it_after_twice_the_deadline() {
    let of = [("1.0", 2, 4), ("1.4", 3, 7)];
    let mut lab = versions(&["group:canary", "100%"], &of);
    lab.published(2);
    for name in ["h2", "h3", "h4"] {
        lab.say(name, 2, LIVE);
    }
    lab.wait(DEADLINE).is("complete 1, running 2 wave 2 of 2");
    assert_eq!(lab.withheld(), ["1.0"], "the quorum is that of 1.4");
    assert_eq!(lab.offered(2), 5 + 7);
    lab.say("h0", 2, LIVE); // half of its canaries
    assert_eq!((lab.withheld().len(), lab.offered(2)), (0, 5 + 7 + 4));

    let mut lab = versions(&["group:canary", "100%"], &of);
    lab.published(2);
    for name in ["h2", "h3", "h4"] {
        lab.say(name, 2, LIVE);
    }
    lab.wait(2 * DEADLINE - 1);
    assert_eq!(lab.offered(2), 5 + 7);
    lab.everybody(2, LIVE);
    assert_eq!(lab.withheld(), Vec::<&str>::new());
    lab.wait(1);
    assert_eq!(lab.offered(2), 16);
}

#[test]
fn a_minority_that_refuses_in_every_wave_does_not_stop_a_good_generation() {
    let mut lab = versions(&["group:canary", "10%", "100%"], &[("1.4", 5, 95)]);
    let liars: Vec<_> = (0..100)
        .filter(|number| number % 5 == 0)
        .map(|number| format!("h{number}"))
        .collect();
    lab.published(2);
    for _ in 0..4 {
        for liar in &liars {
            let host = lab.host(liar);
            if host.offered.contains_key(&2) && !host.answers.contains_key(&2) {
                lab.say(liar, 2, Answer::Refused);
            }
        }
        let honest: Vec<_> = lab.hosts.keys().map(AgentName::to_string).collect();
        for name in honest.iter().filter(|name| !liars.contains(name)) {
            let host = lab.host(name);
            if host.offered.contains_key(&2) && !host.answers.contains_key(&2) {
                lab.say(name, 2, LIVE);
            }
        }
        lab.wait(1);
    }
    lab.is("complete 2");
    assert_eq!(lab.set_aside().len(), liars.len());
    assert_eq!(lab.offered(2), 100);
}

#[test]
fn refusals_that_are_set_aside_one_by_one_still_add_up() {
    let mut lab = versions(&["10", "100%"], &[("1.4", 0, 40)]);
    lab.published(2);
    let wave: Vec<_> = lab
        .hosts
        .iter()
        .filter(|(_, host)| host.offered.contains_key(&2))
        .map(|(name, _)| name.to_string())
        .collect();
    for name in &wave[..4] {
        lab.say(name, 2, LIVE);
    }
    for name in &wave[4..7] {
        lab.say(name, 2, Answer::Refused);
    }
    lab.say(&wave[7], 2, Answer::Refused)
        .is("complete 1, running 2 wave 1 of 2"); // 4 of 4, 2 to come
    lab.say(&wave[8], 2, Answer::Refused)
        .is("complete 1, owes 1 for 2");
}

#[test]
fn a_host_counts_again_in_the_next_rollout_and_after_two_in_a_row_does_not() {
    let mut lab = ten();
    let refuse = |lab: &mut Lab, number| {
        lab.published(number).say("h0", number, Answer::Refused);
        let waits = lab.offered(number) == 3;
        lab.say("h1", number, LIVE);
        lab.say("h2", number, LIVE).everybody(number, LIVE);
        lab.is(&format!("complete {number}"));
        waits
    };
    refuse(&mut lab, 2);
    lab.noted.clear();
    refuse(&mut lab, 3);
    assert!(lab.noted.contains(&"weighing 3".to_owned()));
    assert_eq!(
        lab.rollout.set_aside()[&"h0".parse::<AgentName>().unwrap()].rollouts,
        2
    );
    lab.noted.clear();
    refuse(&mut lab, 4);
    assert!(
        !lab.noted.iter().any(|note| note.starts_with("weighing")),
        "{:?}",
        lab.noted
    );
    // A proof ends it.
    lab.published(5).say("h0", 5, LIVE).step();
    assert!(lab.set_aside().is_empty());
    assert!(lab.noted.contains(&"counted-again h0".to_owned()));
}

#[test]
fn a_host_set_aside_twice_counts_where_too_few_others_of_its_version_are_left() {
    let mut lab = ten();
    for number in [2, 3] {
        lab.published(number).say("h0", number, Answer::Refused);
        lab.say("h1", number, LIVE)
            .say("h2", number, LIVE)
            .everybody(number, LIVE);
    }
    for host in lab.hosts.values_mut().skip(2) {
        host.version = Some("1.0");
    }
    lab.published(4).say("h0", 4, Answer::Refused);
    assert_eq!(lab.withheld(), ["1.4"]);
}

#[test]
fn an_operator_sets_hosts_aside_and_restores_them() {
    let mut lab = ten();
    let host: AgentName = "h0".parse().unwrap();
    let order = |lab: &mut Lab, order| {
        let fleet = Hosts(&lab.hosts, lab.now);
        let effects = lab.rollout.order(order, &fleet, &lab.rules, at(lab.now))?;
        lab.take(effects);
        Ok(())
    };
    let aside = |name: &AgentName| Order::SetAside(name.clone(), "its disk fails".into());
    order(&mut lab, aside(&host)).unwrap();
    let twice = order(&mut lab, aside(&host));
    assert_eq!(twice, Err(OrderError::SetAside(host.clone())));
    let nobody: AgentName = "nobody".parse().unwrap();
    let unknown = order(&mut lab, aside(&nobody));
    assert_eq!(unknown, Err(OrderError::NotEnrolled(nobody)));
    lab.published(2)
        .say("h0", 2, Answer::Refused)
        .say("h1", 2, LIVE)
        .say("h2", 2, LIVE);
    lab.is("complete 1, running 2 wave 2 of 2");
    lab.everybody(2, LIVE)
        .published(3)
        .say("h0", 3, LIVE)
        .step();
    assert_eq!(lab.set_aside(), ["h0"], "until the operator restores it");
    order(&mut lab, Order::Restore(host.clone(), None)).unwrap();
    let again = order(&mut lab, Order::Restore(host.clone(), None));
    assert_eq!(again, Err(OrderError::NotSetAside(host)));
}

#[test]
fn hosts_that_are_set_aside_are_not_drawn_and_get_the_generation_with_the_others() {
    let mut lab = Lab::new(2, 0, &["group:canary", "10%", "100%"]);
    lab.published(1).everybody(1, LIVE);
    for name in ["h0", "h1"] {
        let fleet = Hosts(&lab.hosts, lab.now);
        let order = Order::SetAside(name.parse().unwrap(), "old".into());
        let now = at(lab.now);
        lab.rollout.order(order, &fleet, &lab.rules, now).unwrap();
    }
    lab.published(2).is("complete 1, running 2 wave 0 of 3"); // nobody may judge it
    lab.hosts.insert("new".parse().unwrap(), Host::default());
    lab.step();
    assert_eq!(lab.offered(2), 1);
    lab.say("new", 2, LIVE).is("complete 2");
    assert_eq!(lab.offered(2), 3);
}

#[test]
fn a_wave_settles_at_its_deadline_with_a_quorum_and_leaves_stragglers() {
    let mut lab = ten();
    lab.published(2).say("h0", 2, LIVE).say("h1", 2, LIVE);
    // h2 drips: its own deadline is renewed, and the wave does not wait for it.
    let now = lab.now;
    lab.host("h2").offered.insert(2, (now, now + DEADLINE - 1));
    lab.wait(DEADLINE - 1)
        .is("complete 1, running 2 wave 1 of 2");
    lab.wait(1).is("complete 1, running 2 wave 2 of 2");
    assert!(lab.noted.contains(&"stragglers 2".to_owned()));
    assert_eq!(
        lab.wanted(&"h2".parse().unwrap()),
        Some(2),
        "it is still offered"
    );
}

#[test]
fn many_hosts_with_trouble_pause_a_wave_until_its_deadline_if_half_have_proven_it() {
    let mut lab = versions(&["group:canary", "100%"], &[("1.4", 9, 1)]);
    lab.published(2);
    for name in ["h0", "h1", "h2"] {
        lab.say(name, 2, Answer::Unwell);
    }
    lab.is("complete 1, running 2 wave 1 of 2, paused Unwell");
    for name in ["h3", "h4", "h5", "h6", "h7", "h8"] {
        lab.say(name, 2, LIVE);
    }
    lab.wait(DEADLINE - 1)
        .is("complete 1, running 2 wave 1 of 2, paused Unwell");
    lab.wait(1).is("complete 1, running 2 wave 2 of 2");
}

#[test]
fn a_switched_off_host_of_a_small_fleet_delays_nobody() {
    // The only canary of three is off.
    let mut lab = Lab::new(3, 1, &["group:canary", "10%", "100%"]);
    lab.host("h0").away = true;
    lab.host("h0").seen = lab.now - 60;
    lab.published(1).everybody(1, LIVE).is("complete 1");
    assert_eq!(lab.offered(1), 2);
    lab.host("h0").away = false;
    lab.step();
    assert_eq!(lab.offered(1), 3, "it catches up");
}

#[test]
fn a_large_fleet_waits_one_deadline_for_a_canary_to_connect() {
    let mut lab = Lab::new(30, 2, &["group:canary", "10%", "100%"]);
    for name in ["h0", "h1"] {
        lab.host(name).away = true;
        lab.host(name).seen = lab.now - 60;
    }
    lab.published(1).wait(DEADLINE - 1);
    assert_eq!(lab.offered(1), 0);
    lab.wait(1);
    assert_eq!(
        lab.offered(1),
        3,
        "a tenth of the connected hosts in their place"
    );
}

#[test]
fn a_newer_generation_takes_the_place_of_a_stuck_one_after_the_time_of_its_waves() {
    let mut lab = Lab::usual();
    lab.published(2)
        .say("h0", 2, Answer::Unwell)
        .say("h1", 2, Answer::Unwell);
    lab.published(3).wait(3 * DEADLINE - 1);
    lab.is("complete 1, running 2 wave 1 of 3, paused Unwell, waiting 3");
    lab.wait(1).is("complete 1, running 3 wave 1 of 3");
}

#[test]
fn the_time_of_an_operators_pause_does_not_count() {
    let mut lab = Lab::usual();
    lab.published(2).say("h0", 2, LIVE);
    lab.wait(60);
    lab.order(|lab, now| lab.rollout.pause("lunch".into(), now));
    lab.published(3).wait(10 * DEADLINE);
    lab.resume().unwrap();
    lab.step()
        .is("complete 1, running 2 wave 1 of 3, waiting 3");
    lab.wait(DEADLINE - 61)
        .is("complete 1, running 2 wave 1 of 3, waiting 3");
    lab.wait(1)
        .is("complete 1, running 2 wave 2 of 3, waiting 3");
}

#[test]
fn a_stream_of_publications_starves_no_wave() {
    let mut lab = versions(&["group:canary", "10%", "100%"], &[("1.4", 4, 16)]);
    let dripping: Vec<_> = (0..20)
        .filter(|number| number % 4 == 0)
        .map(|number| format!("h{number}"))
        .collect();
    let mut newest = 2;
    lab.published(newest);
    let mut completed = Vec::new();
    for _ in 0..40 {
        lab.wait(300);
        newest += 1;
        lab.published(newest);
        let running = lab
            .rollout
            .running()
            .map(|run| number(&run.target))
            .unwrap();
        for name in lab
            .hosts
            .keys()
            .map(AgentName::to_string)
            .collect::<Vec<_>>()
        {
            let (now, host) = (lab.now, lab.host(&name));
            let asked = host.offered.contains_key(&running) && !host.answers.contains_key(&running);
            if asked && dripping.contains(&name) {
                host.offered.get_mut(&running).unwrap().1 = now;
            } else if asked {
                lab.say(&name, running, LIVE);
            }
        }
        let complete = lab.rollout.complete().map(number);
        if completed.last() != complete.as_ref() {
            completed.extend(complete);
        }
    }
    assert!(completed.len() >= 4, "{completed:?}");
}
