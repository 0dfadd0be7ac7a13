//! Compiles the device's kernels: by nvcc for GPUs (feature `cuda`), by a C++ compiler for
//! the tests' emulator (feature `emulator`).
//!
//! `CUDA_COMPUTE_CAP` lists the compute capabilities ("80,90"); the nvcc on the PATH, in
//! `CUDA_HOME`, or named by `NVCC` is used. `FARM_CUDA_CHECK=1` leaves the kernels out, for
//! type-checks on machines without a toolkit; what is built so finds no kernels when it runs.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, thread};

/// The start of `kernels.rs`: the driver reads words of what it is given.
const HEAD: &str = "\
/// Bytes at an address that the driver can read words from.
#[repr(C, align(64))]
pub struct Aligned<T: ?Sized>(pub T);
/// A fat binary a file.
pub const MODULES: &[&Aligned<[u8]>] = &[
";
const KERNELS: &str = "src/device/kernels";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed={KERNELS}");
    for name in ["CUDA_COMPUTE_CAP", "CUDA_HOME", "NVCC", "FARM_CUDA_CHECK"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        for_devices();
    }
    #[cfg(feature = "emulator")]
    for_the_emulator();
}

/// Kernel files, by name.
fn sources() -> Vec<PathBuf> {
    let entries = fs::read_dir(KERNELS).expect("the kernels' folder");
    let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "cu"));
    files.sort();
    files
}

/// Writes `kernels.rs`: the compute capabilities, and a fat binary a file.
fn for_devices() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let mut list = String::from(HEAD);
    let mut built_for = String::new();
    if env::var_os("FARM_CUDA_CHECK").is_none_or(|value| value != "1") {
        let nvcc = nvcc();
        let capabilities = capabilities(&nvcc);
        built_for = capabilities.join(",");
        let compile = |source: &PathBuf| compile(&nvcc, source, &capabilities, &out);
        let threads: Vec<_> = thread::scope(|scope| {
            let running: Vec<_> =
                sources().into_iter().map(|source| scope.spawn(move || compile(&source))).collect();
            running.into_iter().map(|t| t.join().expect("a compilation")).collect()
        });
        for file in threads {
            list += &format!("    &Aligned(*include_bytes!({file:?})),\n");
        }
    }
    list += &format!(
        "];\n/// Compute capabilities, with commas.\npub const BUILT_FOR: &str = {built_for:?};\n"
    );
    fs::write(out.join("kernels.rs"), list).expect("OUT_DIR can be written");
}

fn nvcc() -> PathBuf {
    if let Some(nvcc) = env::var_os("NVCC") {
        return nvcc.into();
    }
    let home = env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc"));
    match home {
        Some(nvcc) if nvcc.exists() => nvcc,
        _ => "nvcc".into(),
    }
}

/// What to compile for: as asked, else what the clusters' cards are, as far as this nvcc goes
/// (13 has dropped Volta).
fn capabilities(nvcc: &Path) -> Vec<String> {
    let asked = env::var("CUDA_COMPUTE_CAP").unwrap_or_default();
    let asked: Vec<String> = asked
        .split([',', ' ', ';'])
        .map(|capability| capability.trim().replace('.', ""))
        .filter(|capability| !capability.is_empty())
        .collect();
    if !asked.is_empty() {
        return asked;
    }
    let version = Command::new(nvcc).arg("--version").output().unwrap_or_else(|error| {
        panic!(
            "feature cuda: {} does not start ({error}). `make cuda` gets one; a site's own is \
             found on the PATH or in CUDA_HOME; FARM_CUDA_CHECK=1 leaves the kernels out",
            nvcc.display()
        )
    });
    let old = String::from_utf8_lossy(&version.stdout).contains("release 12.");
    let list: &[&str] = if old { &["70", "80", "90"] } else { &["80", "90"] };
    list.iter().map(|capability| (*capability).to_owned()).collect()
}

/// One file for all capabilities; newer cards take the last one's PTX.
fn compile(nvcc: &Path, source: &Path, capabilities: &[String], out: &Path) -> PathBuf {
    let file = out.join(source.with_extension("fatbin").file_name().expect("a file's name"));
    let mut command = Command::new(nvcc);
    command.args(["-std=c++17", "-O3", "-I", KERNELS, "-fatbin"]);
    for (i, capability) in capabilities.iter().enumerate() {
        let last = i + 1 == capabilities.len();
        let ptx = if last { format!(",compute_{capability}") } else { String::new() };
        command.arg("-gencode");
        command.arg(format!("arch=compute_{capability},code=[sm_{capability}{ptx}]"));
    }
    let output = command.arg(source).arg("-o").arg(&file).output().unwrap_or_else(|error| {
        panic!("feature cuda: {} does not start: {error}", nvcc.display());
    });
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}:\n{said}", source.display());
    file
}

#[cfg(feature = "emulator")]
fn for_the_emulator() {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").include(KERNELS).define("FARM_EMULATOR", None);
    build.flag("-xc++").opt_level(2).warnings(false);
    // Kernels are found by name: nothing refers to their files.
    build.link_lib_modifier("+whole-archive");
    build.files(sources()).file(format!("{KERNELS}/emulator.cpp")).compile("farm_emulator");
}
