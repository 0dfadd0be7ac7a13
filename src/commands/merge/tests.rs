use super::*;
use crate::kernels::quant::QuantType;

#[test]
fn values_are_rounded_to_the_type_or_refused() {
    let encoded = |values: &[f32], dtype: &StoredDtype| {
        let mut bytes = Vec::new();
        encode(values, values.len(), dtype, &mut bytes).map(|()| bytes)
    };
    let values = [1.0, -2.5, f32::INFINITY];
    let bf16s: Vec<u8> = values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
    assert_eq!(encoded(&values, &StoredDtype::Bf16).unwrap(), bf16s);
    let f16s: Vec<u8> = values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect();
    assert_eq!(encoded(&values, &StoredDtype::F16).unwrap(), f16s);
    assert_eq!(encoded(&values, &StoredDtype::F32).unwrap().len(), 12);
    assert_eq!(encoded(&[0.5; 32], &StoredDtype::Quant(QuantType::Q8_0)).unwrap().len(), 34);
    // A weight that became infinite would be a silent ruin.
    let error = encoded(&[1e6], &StoredDtype::F16).unwrap_err();
    assert!(error.message.contains("too large for f16"), "{error}");
    assert!(encoded(&[1.0], &StoredDtype::Other("I64".into())).is_err());
}

#[test]
fn what_is_not_whole_goes() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("model");
    let partial = Partial::beside(&output).unwrap();
    std::fs::create_dir(&partial.path).unwrap();
    std::fs::write(partial.path.join("a"), "a").unwrap();
    drop(partial);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    let partial = Partial::beside(&output).unwrap();
    std::fs::write(&partial.path, "a").unwrap();
    partial.rename(&output).unwrap();
    assert_eq!(std::fs::read(&output).unwrap(), b"a");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}
