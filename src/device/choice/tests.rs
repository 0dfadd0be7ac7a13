//! Nodes as Slurm hands them out, and what each rank of them gets.

use proptest::prelude::*;

use super::*;
use crate::ErrorKind;

fn card(ordinal: usize, number: u8) -> Visible {
    let mut bytes = [7; 16];
    bytes[0] = number;
    Visible {
        ordinal,
        uuid: Visible::uuid_text(bytes, false),
        pci_bus_id: Some(format!("0000:{number:02x}:00.0")),
        name: "NVIDIA H200".into(),
        compute_capability: (9, 0),
        memory_bytes: 141 << 30,
        emulated: false,
    }
}

/// A rank that sees these cards, in this order.
fn sees(rank: usize, numbers: &[u8]) -> Seen {
    let cards = numbers.iter().enumerate().map(|(ordinal, &number)| card(ordinal, number));
    Seen::new(rank, Ok(cards.collect()), None)
}

fn sees_none(rank: usize, missing: NoDevice) -> Seen {
    Seen::new(rank, Err(missing), Some("0"))
}

fn hopper() -> Built {
    Built::parse("80,90")
}

/// Ordinal of each rank's device and whether it leads it; -1 is the CPU.
fn ordinals(choices: &[Choice]) -> Vec<(i32, bool)> {
    let place = |choice: &Choice| match choice {
        Choice::Cpu { .. } => (-1, false),
        Choice::Gpu { device, leads, .. } => (device.ordinal as i32, *leads),
    };
    choices.iter().map(place).collect()
}

fn chosen(wish: Wish, node: &[Seen], share: bool) -> Vec<(i32, bool)> {
    ordinals(&choose(wish, "n1", node, &hopper(), share).unwrap())
}

fn message(wish: Wish, node: &[Seen], built: &Built) -> String {
    let error = choose(wish, "n1", node, built, false).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Usage, "{error}");
    error.message
}

#[test]
fn ranks_that_see_all_take_one_each_in_order() {
    let node: Vec<Seen> = (0..4).map(|rank| sees(rank, &[1, 2, 3, 4])).collect();
    for wish in [Wish::Auto, Wish::Cuda] {
        assert_eq!(chosen(wish, &node, false), [(0, true), (1, true), (2, true), (3, true)]);
    }
    assert_eq!(chosen(Wish::Cpu, &node, false), [(-1, false); 4]);
}

/// --gpus-per-task: each sees its own as number 0.
#[test]
fn ranks_that_see_one_each_take_it() {
    let node = [sees(4, &[1]), sees(5, &[2]), sees(6, &[3])];
    assert_eq!(chosen(Wish::Cuda, &node, false), [(0, true); 3]);
}

#[test]
fn two_ranks_on_one_gpu_are_an_error_with_the_fix_or_allowed_by_the_flag() {
    let node = [sees(2, &[1, 2]), sees(3, &[1, 2]), sees(4, &[1, 2])];
    let text = message(Wish::Auto, &node, &hopper());
    for part in ["n1", "ranks 2, 3, 4", "2 GPUs", "start 2 ranks", "3 GPUs", "--share-device"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("--gpu-bind"), "{text}");
    assert_eq!(chosen(Wish::Auto, &node, true), [(0, true), (1, true), (0, false)]);
    let Choice::Gpu { ranks, .. } = &choose(Wish::Auto, "n1", &node, &hopper(), true).unwrap()[2]
    else {
        panic!("not on a GPU");
    };
    assert_eq!(*ranks, 2);
    // Slurm bound both to the same one.
    let text = message(Wish::Cuda, &[sees(0, &[1]), sees(1, &[1])], &hopper());
    assert!(text.contains("--gpu-bind=none") && text.contains("GPU-01"), "{text}");
    // With a GPU of its own for each nothing is shared, whatever the flag says.
    let node = [sees(0, &[1, 2]), sees(1, &[1, 2])];
    assert_eq!(chosen(Wish::Auto, &node, true), [(0, true), (1, true)]);
}

/// (why there is none, what auto logs, what cuda's error says)
#[test]
fn without_a_device_auto_takes_the_cpu_and_cuda_says_why() {
    let absent = || NoDevice::NoDriver("libcuda.so.1: cannot open shared object file".into());
    for (missing, parts) in [
        (NoDevice::NotBuilt, &["compiled without CUDA", "make cuda"][..]),
        (absent(), &["no NVIDIA driver (libcuda.so.1", "rank 7 on n1", "--gpus-per-node"]),
        (NoDevice::NoneVisible, &["no GPU", "CUDA_VISIBLE_DEVICES is '0'", "--gpus-per-node"]),
        (NoDevice::Failed("CUDA_ERROR_SYSTEM_NOT_READY".into()), &["SYSTEM_NOT_READY"]),
    ] {
        let node = [sees_none(7, missing.clone())];
        let text = message(Wish::Cuda, &node, &hopper());
        assert!(text.starts_with("--device cuda: ") && text.ends_with("--device cpu"), "{text}");
        parts.iter().for_each(|part| assert!(text.contains(part), "{part}: {text}"));
        let choices = choose(Wish::Auto, "n1", &node, &hopper(), false).unwrap();
        assert_eq!(choices, [Choice::Cpu { reason: Some(missing.to_string()) }]);
    }
    let empty = Seen::new(0, Ok(Vec::new()), Some(""));
    assert!(message(Wish::Cuda, &[empty], &hopper()).contains("set and empty"));
}

#[test]
fn a_rank_without_one_beside_ranks_with_one_is_left_on_the_cpu_or_refused() {
    let node = [sees(0, &[1]), sees_none(1, NoDevice::NoneVisible)];
    assert_eq!(chosen(Wish::Auto, &node, false), [(0, true), (-1, false)]);
    assert!(message(Wish::Cuda, &node, &hopper()).contains("rank 1 on n1"));
}

#[test]
fn code_runs_on_cards_of_its_major_version() {
    for (built, capability, runs) in [
        ("80,90", (9, 0), true),
        ("80,90", (8, 0), true),
        ("80,90", (8, 9), true),
        ("80,90", (7, 0), false),
        ("80,90", (10, 0), true),
        ("70, 80", (7, 5), true),
        ("86", (8, 0), false),
        ("90,80", (9, 0), true),
        ("70", (9, 0), true),
        ("120", (12, 0), true),
        ("", (8, 0), false),
    ] {
        assert_eq!(Built::parse(built).runs_on(capability), runs, "{built} on {capability:?}");
    }
}

#[test]
fn a_card_that_the_kernels_were_not_built_for_is_passed_over() {
    let volta = |ordinal, number| Visible {
        name: "Tesla V100-SXM2-32GB".into(),
        compute_capability: (7, 0),
        ..card(ordinal, number)
    };
    let old = Seen::new(0, Ok(vec![volta(0, 1)]), None);
    let text = message(Wish::Cuda, std::slice::from_ref(&old), &hopper());
    for part in ["80,90", "V100", "has 70", "CUDA 12", "CUDA_COMPUTE_CAP=70,80,90"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let choices = choose(Wish::Auto, "n1", &[old], &hopper(), false).unwrap();
    assert!(matches!(&choices[0], Choice::Cpu { reason: Some(why) } if why.contains("built for")));
    // A display card beside the one to compute on.
    let mixed = Seen::new(0, Ok(vec![volta(0, 1), card(1, 2)]), None);
    assert_eq!(chosen(Wish::Cuda, &[mixed], false), [(1, true)]);
}

/// Old drivers give each slice the uuid of its card; the variable tells them apart.
#[test]
fn slices_of_one_card_are_two_devices() {
    let slice = || Visible { name: "NVIDIA A100-SXM4-40GB MIG 1g.5gb".into(), ..card(0, 1) };
    assert!(slice().is_slice());
    let named = |rank, name: &str| Seen::new(rank, Ok(vec![slice()]), Some(name));
    let old = "MIG-GPU-8932f937-d72c-4106-c12f-20bd9faed9f6";
    let node = [named(0, &format!("{old}/1/0")), named(1, &format!("{old}/2/0"))];
    assert_eq!(chosen(Wish::Cuda, &node, false), [(0, true); 2]);
    let same = [named(0, &format!("{old}/1/0")), named(1, &format!("{old}/1/0"))];
    assert!(choose(Wish::Cuda, "n1", &same, &hopper(), false).is_err());
}

/// A virtual GPU may have no uuid; its place on the bus then says which it is.
#[test]
fn devices_without_a_uuid_are_told_apart_by_their_place() {
    assert_eq!(Visible::uuid_text([0; 16], false), None);
    let bare =
        |rank, number| Seen::new(rank, Ok(vec![Visible { uuid: None, ..card(0, number) }]), None);
    assert_eq!(chosen(Wish::Cuda, &[bare(0, 1), bare(1, 2)], false), [(0, true); 2]);
    assert!(choose(Wish::Cuda, "n1", &[bare(0, 1), bare(1, 1)], &hopper(), false).is_err());
    let text = Visible::uuid_text(std::array::from_fn(|i| i as u8), true);
    assert_eq!(text.as_deref(), Some("MIG-00010203-0405-0607-0809-0a0b0c0d0e0f"));
}

fn on(rank: usize, host: &str, device: Option<Visible>) -> Chosen {
    let choice = match device {
        Some(device) => Choice::Gpu { device, ranks: 1, leads: true },
        None => Choice::Cpu { reason: Some("no NVIDIA driver".into()) },
    };
    Chosen { rank, host: host.into(), choice }
}

#[test]
fn a_group_is_of_one_kind() {
    let ranks = [on(0, "n1", Some(card(0, 1))), on(1, "n2", None)];
    let error = same_kind_in_groups(&ranks, 2).unwrap_err();
    for part in ["rank 0 on n1 on cuda", "rank 1 on n2 on cpu", "no NVIDIA driver", "cpu"] {
        assert!(error.message.contains(part), "{part}: {error}");
    }
    // Replicas may differ, and that is said.
    same_kind_in_groups(&ranks, 1).unwrap();
    let said = warnings(&ranks, 1);
    assert!(said.len() == 1 && said[0].contains("1 of 2 ranks compute on the CPU"), "{said:?}");
    assert_eq!(least_capability(&ranks), Some((9, 0)));
    assert_eq!(least_capability(&ranks[1..]), None);
    assert!(warnings(&ranks[1..], 1).is_empty());
}

#[test]
fn a_group_over_unlike_cards_is_warned_of() {
    let ampere = Visible { name: "NVIDIA A100".into(), compute_capability: (8, 0), ..card(0, 2) };
    let ranks = [on(0, "n1", Some(card(0, 1))), on(1, "n2", Some(ampere))];
    let said = warnings(&ranks, 2);
    assert!(said.len() == 1 && said[0].contains("NVIDIA A100 (rank 1 on n2)"), "{said:?}");
    assert!(warnings(&ranks, 1).is_empty());
    assert_eq!(least_capability(&ranks), Some((8, 0)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    /// Whatever the ranks see: each gets a device that it sees, no two the same unless they may
    /// share, each device has one leader, and sharing is never an error.
    #[test]
    fn a_choice_is_sound(
        node in prop::collection::vec(prop::collection::btree_set(1u8..6, 0..5), 1..7),
        share in any::<bool>(),
    ) {
        let node: Vec<Seen> = node.iter().enumerate()
            .map(|(rank, numbers)| sees(rank, &numbers.iter().copied().collect::<Vec<_>>()))
            .collect();
        let Ok(choices) = choose(Wish::Auto, "n1", &node, &hopper(), share) else {
            prop_assert!(!share);
            return Ok(());
        };
        let mut leaders = Vec::new();
        for (seen, choice) in node.iter().zip(&choices) {
            match choice {
                Choice::Cpu { reason } => prop_assert!(seen.devices.is_empty() && reason.is_some()),
                Choice::Gpu { device, ranks, leads } => {
                    prop_assert_eq!(&seen.devices[device.ordinal], device);
                    prop_assert!(share || *ranks == 1);
                    if *leads { leaders.push(device.uuid.clone()) }
                }
            }
        }
        let count = leaders.len();
        leaders.sort();
        leaders.dedup();
        prop_assert_eq!(leaders.len(), count);
    }
}
