//! The binary as a person meets it: exit codes, messages, settings, and the clients against a
//! server made here.

mod bench;
mod fake;
#[cfg(target_os = "linux")]
mod gpu;
mod keys;
mod merge;

use fake::server;
use polylora::config::{GONE, SETTINGS};
use serde_json::json;
use std::io::Write as _;
use std::process::{Command, Stdio};
use support::command::{out, polylora, polylora_with, program, refused};
use support::live::Live;

fn config_file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::Builder::new().suffix(".toml").tempfile().expect("a file");
    std::fs::write(file.path(), text).expect("written");
    file
}

/// What `--print-config` says of a key: its line.
fn printed(page: &str, key: &str) -> String {
    let found = |l: &&str| l.trim_start_matches("# ").starts_with(&format!("{key} = "));
    page.lines().find(found).unwrap_or_else(|| panic!("{key} in {page}")).to_owned()
}

#[test]
fn every_command_teaches_by_example() {
    let commands = ["serve", "chat", "adapter", "merge", "verify", "bench", "health"];
    let top = out(&polylora(&["--help"]));
    for command in commands {
        assert!(top.contains(command), "{command} in {top}");
        let page = out(&polylora(&[command, "--help"]));
        assert!(page.contains("Examples:"), "{command}: {page}");
        assert!(page.contains(&format!("polylora {command}")), "{command}: {page}");
    }
}

#[test]
fn wrong_arguments_are_one_line_and_exit_code_2() {
    let said = refused(&polylora(&["serve", "--prot", "80"]), 2);
    assert!(said.contains("--prot") && said.contains("--port"), "{said}");
    refused(&polylora(&["serve", "--kv-bytes", "lots"]), 2);
    refused(&polylora(&["serve", "--adapter", "pirate"]), 2);
    refused(&polylora(&["frobnicate"]), 2);
    refused(&polylora(&["bench", "--popularity", "zipf"]), 2);
    refused(&polylora(&["bench", "--rate", "0"]), 2);
    refused(&polylora(&["bench", "--contender", "nonsense"]), 2);
    let said = refused(&polylora(&["bench", "--contender", "l=http://[::1]:1,lora=first"]), 2);
    assert!(said.contains("lora=first"), "{said}");
    let both = "l=http://[::1]:1,model=a,model=b,lora=0";
    let said = refused(&polylora(&["bench", "--contender", both]), 2);
    assert!(said.contains("one model=M"), "{said}");
    refused(&polylora(&["adapter", "show", "../secrets"]), 2);
    refused(&polylora(&["adapter", "push", "a", "Cargo.toml"]), 2);
}

#[test]
fn mistakes_in_the_file_name_file_key_and_line() {
    let check = |text: &str, line: usize, parts: &[&str]| {
        let file = config_file(text);
        let name = file.path().to_string_lossy().into_owned();
        let said = refused(&polylora(&["serve", "--config", &name]), 2);
        let place = format!("{name}:{line}: ");
        assert!(said.contains(&place), "{said} should name {place}");
        assert!(parts.iter().all(|p| said.contains(p)), "{said} should say {parts:?}");
    };
    check("port = 80\nkv_byte = 5\n", 2, &["kv_byte", "kv_bytes"]);
    check("\n\nport = \"eighty\"\n", 3, &["port", "eighty"]);
    check("host = \"::1\"\nrows_max = 0\n", 2, &["rows_max", "0", "1 to 8192"]);
    check("kv_bytes = \"5 parsecs\"\n", 1, &["kv_bytes", "5 parsecs", "512MiB"]);
    check("adapters = 3\n", 1, &["adapters"]);
    check("host = \"::1\"\nport = [1, 2]\n", 2, &["port", "one value"]);
    check("drain_seconds = 1.5\n", 1, &["drain_seconds is 1.5", "0 to 3600"]);
    check("rows_max = 8\nmax-num-batched-tokens = 9\n", 2, &["rows_max", "once more"]);
    check("port = \n", 1, &["port"]);
    let said = refused(&polylora(&["serve", "--config", "no-such.toml"]), 2);
    assert!(said.contains("no-such.toml"), "{said}");
}

#[test]
fn settings_that_cannot_be_name_the_key_and_what_was_expected() {
    let check = |args: &[&str], parts: &[&str]| {
        let said = refused(&polylora(&[&["serve"], args].concat()), 2);
        assert!(parts.iter().all(|p| said.contains(p)), "{said} should say {parts:?}");
    };
    check(&["--threads", "0"], &["threads", "--threads", "POLYLORA_THREADS", "1 to 1024"]);
    check(&["--dtype", "int3"], &["dtype", "int3", "auto, f32, bf16"]);
    check(&["--device", "gpu"], &["device", "'gpu'", "auto, cpu or cuda:N"]);
    check(&["--sequences-max", "512"], &["sequences_max", "512", "rows_max = 256"]);
    check(&["--kv-bytes", "lots"], &["kv_bytes", "--kv-bytes", "'lots'", "512MiB"]);
    check(&["--usage-sync", "yes"], &["usage_sync", "'yes'", "true or false"]);
    check(&["--host", "0.0.0.0"], &["host", "0.0.0.0", "POLYLORA_API_KEY", "allow_open"]);
    check(&["--api-key", ""], &["api_key", "empty"]);
    check(&["--adapter", "a=x", "--adapter", "a=y"], &["adapters", "'a' twice"]);
    check(&["--log-format", "xml"], &["log_format", "xml", "json"]);
}

#[test]
fn an_open_address_wants_a_key_or_the_operators_word() {
    // Its own directory: keys that somebody made in the usual one would open the address.
    let data = tempfile::tempdir().expect("directory");
    let data = data.path().to_str().expect("UTF-8");
    let print = |args: &[&str]| {
        polylora(&[&["serve", "--print-config", "--data-dir", data], args].concat())
    };
    assert!(print(&["--host", "0.0.0.0", "--api-key", "k"]).status.success());
    assert!(print(&["--host", "0.0.0.0", "--allow-open"]).status.success());
    assert!(print(&["--host", "::1"]).status.success());
    refused(&print(&["--host", "example.org"]), 2);
}

#[test]
fn flag_wins_over_environment_over_file_over_default() {
    let file = config_file(
        "port = 1\nrows_max = 111\nsequences_max = 11\nkv_bytes = \"64MiB\"\n\
         [adapters]\na = \"file-a\"\nb = \"file-b\"\n",
    );
    let name = file.path().to_string_lossy().into_owned();
    let args =
        ["serve", "--print-config", "--config", &name, "--port", "3", "--adapter", "a=flag-a"];
    let env = [("POLYLORA_PORT", "2"), ("POLYLORA_ROWS_MAX", "222")];
    let page = out(&polylora_with(&args, &env));
    assert_eq!(printed(&page, "port"), "port = 3");
    assert_eq!(printed(&page, "rows_max"), "rows_max = 222");
    assert_eq!(printed(&page, "sequences_max"), "sequences_max = 11");
    assert_eq!(printed(&page, "kv_bytes"), format!("kv_bytes = {}", 64 << 20));
    assert_eq!(printed(&page, "versions_kept"), "# versions_kept = 3");
    assert!(page.contains("\"a\" = \"flag-a\"") && page.contains("\"b\" = \"file-b\""), "{page}");
}

#[test]
fn the_printed_file_has_every_key_and_is_accepted_with_every_line_uncommented() {
    let page = out(&polylora_with(&["serve", "--print-config"], &[("POLYLORA_API_KEY", "hush")]));
    assert!(!page.contains("hush"), "the key is not printed");
    for row in SETTINGS {
        assert!(page.contains(&format!("--{}", row.flag())), "{} in {page}", row.key);
        assert!(page.contains(&row.env()) && !row.help().is_empty(), "{}", row.key);
        assert!(row.expected().is_none_or(|e| page.contains(&e)), "{}", row.key);
    }
    // A setting is `# key = value`; prose has spaces before its first `=`, if any.
    let is_setting = |rest: &str| {
        let key = rest.split_once(" = ").map(|(key, _)| key);
        key.is_some_and(|k| !k.contains(' '))
    };
    let live = |l: &str| match l.strip_prefix("# ") {
        Some(rest) if is_setting(rest) => rest.to_owned(),
        _ => l.to_owned(),
    };
    let text: Vec<String> = page.lines().map(live).collect();
    let set = text.iter().filter(|l| is_setting(l) && l.contains(" = ")).count();
    assert_eq!(set, SETTINGS.len(), "one line per key");
    let file = config_file(&text.join("\n"));
    let name = file.path().to_string_lossy().into_owned();
    let again = polylora(&["serve", "--print-config", "--config", &name]);
    assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
}

#[test]
fn vllms_names_are_flags_and_keys_too() {
    let data = tempfile::tempdir().expect("directory");
    let data = data.path().to_str().expect("UTF-8");
    let names = [
        ("served-model-name", "served_name", "\"a\""),
        ("max-model-len", "context", "4096"),
        ("max-num-batched-tokens", "rows_max", "99"),
        ("max-num-seqs", "sequences_max", "9"),
    ];
    let print = |args: &[&str]| {
        let print = ["serve", "--print-config", "--data-dir", data];
        out(&polylora(&[&print, args].concat()))
    };
    let flags = names.map(|(name, _, value)| format!("--{name}={}", value.replace('"', "")));
    let by_flags = print(&flags.each_ref().map(String::as_str));
    for dash in ["-", "_"] {
        let lines =
            names.map(|(name, _, value)| format!("{} = {value}\n", name.replace('-', dash)));
        let file = config_file(&(lines.concat() + &format!("api{dash}key = \"hush\"\n")));
        let by_file = print(&["--config", &file.path().to_string_lossy()]);
        for (_, key, value) in names {
            assert_eq!(printed(&by_file, key), format!("{key} = {value}"));
            assert_eq!(printed(&by_flags, key), format!("{key} = {value}"));
        }
        assert!(!by_file.contains("hush"), "{by_file}");
    }
    let help = out(&polylora(&["serve", "--help"]));
    assert!(names.iter().all(|(name, ..)| help.contains(&format!("--{name}"))), "{help}");
}

/// Whoever still sets it is told so, in one line, wherever it stands.
#[test]
fn a_setting_of_an_earlier_version_says_what_became_of_it() {
    assert!(GONE.iter().all(|gone| SETTINGS.iter().all(|row| row.key != gone.key)));
    let help = out(&polylora(&["serve", "--help"]));
    for gone in GONE {
        let flag = format!("--{}", gone.key.replace('_', "-"));
        let variable = format!("POLYLORA_{}", gone.key.to_uppercase());
        let file = config_file(&format!("port = 1\n{} = 5\n", gone.key));
        let name = file.path().to_string_lossy().into_owned();
        let place = format!("error: {name}:2: {} is no setting any more: it is ", gone.key);
        let said = refused(&polylora(&["serve", "--config", &name]), 2);
        assert!(said.starts_with(&place) && said.contains(&gone.why()), "{said}");
        let place = format!("error: {} ({flag} or {variable}) is no setting any more", gone.key);
        for o in [
            polylora(&["serve", &flag, "5"]),
            polylora_with(&["serve"], &[(variable.as_str(), "5")]),
        ] {
            let said = refused(&o, 2);
            assert!(said.starts_with(&place) && said.contains(&gone.why()), "{said}");
        }
        assert!(!help.contains(&flag), "{flag} is not offered");
    }
}

#[test]
fn the_default_model_is_the_demo() {
    assert_eq!(polylora::config::MODEL, polylora::checkpoint::source::DEMO);
}

#[test]
fn a_server_that_is_not_there_is_one_line_that_says_what_to_do() {
    for args in [vec!["chat", "hello"], vec!["adapter", "list"], vec!["health"], vec!["bench"]] {
        let said = refused(&polylora(&[args, vec!["--url", "http://127.0.0.1:9"]].concat()), 1);
        assert!(said.contains("127.0.0.1:9") && said.contains("polylora serve"), "{said}");
    }
    refused(&polylora(&["chat", "hello", "--url", "localhost"]), 2);
}

#[test]
fn one_question_prints_one_answer() {
    let (url, seen) = server();
    let args = ["chat", "--url", &url, "--model-name", "pirate", "--system", "Be brief", "Who?"];
    assert_eq!(out(&polylora(&args)), "Avast, ye lubber\n");
    let body = seen.lock().expect("lock")[0].1.clone();
    assert_eq!(body["model"], "pirate");
    let system = json!({"role": "system", "content": "Be brief"});
    assert_eq!(body["messages"], json!([system, {"role": "user", "content": "Who?"}]));
    polylora(&["chat", "--url", &format!("{url}/v1/"), "Who?"]);
    assert_eq!(seen.lock().expect("lock")[1].1["model"], "base", "the first that the server lists");
}

#[test]
fn a_refusal_is_shown_in_the_servers_words() {
    let (url, _) = server();
    let said = refused(&polylora(&["chat", "--url", &url, "--model-name", "busy", "Who?"]), 1);
    assert_eq!(said, "error: no, not that (429 queue_full)\n");
    let o = polylora(&["chat", "--url", &url, "--model-name", "breaks", "Who?"]);
    assert_eq!(out(&o), "Avast, \n", "what came stays on its own line");
    assert!(refused(&o, 1).contains("step failed (stream: internal_error)"));
}

#[test]
fn a_conversation_that_nobody_types_ends_with_the_first_refusal() {
    let (url, seen) = server();
    let talk = |model: &str| {
        let mut command = Command::new(program());
        command.args(["chat", "--url", &url, "--model-name", model]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the binary runs");
        let mut typed = child.stdin.take().expect("a pipe");
        typed.write_all(b"Who?\nWhere?\n").expect("written");
        drop(typed);
        child.wait_with_output().expect("it ends")
    };
    let said = talk("pirate");
    assert!(said.status.success(), "{said:?}");
    assert_eq!(seen.lock().expect("lock").len(), 2);
    let said = talk("busy");
    assert_eq!(said.status.code(), Some(1), "{said:?}");
    assert_eq!(seen.lock().expect("lock").len(), 3, "the second line is not asked");
}

#[test]
fn a_directory_is_pushed_as_its_two_files_and_nothing_else() {
    let (url, seen) = server();
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name);
    let path = dir.path().to_string_lossy().into_owned();
    std::fs::write(at("adapter_config.json"), "{}").expect("written");
    let said = refused(&polylora(&["adapter", "push", "mine", &path, "--url", &url]), 2);
    assert!(said.contains("adapter_model.safetensors is missing"), "{said}");
    let said = refused(&polylora(&["adapter", "push", "mine", "no/such", "--url", &url]), 2);
    assert_eq!(said, "error: no/such is no directory or file on this machine\n");
    std::fs::write(at("adapter_model.safetensors"), "12345").expect("written");
    std::fs::write(at("optimizer.pt"), "secret").expect("written");
    let o = polylora(&["adapter", "push", "mine", &path, "--url", &url]);
    assert_eq!(out(&o), "mine@1  ready\n");
    let expected = json!([
        {"name": "adapter_config.json", "bytes": 2},
        {"name": "adapter_model.safetensors", "bytes": 5},
    ]);
    assert_eq!(*seen.lock().expect("lock"), [("mine".to_owned(), expected)]);
    let said = refused(&polylora(&["adapter", "push", "refused", &path, "--url", &url]), 1);
    assert_eq!(said, "error: no, not that (422 shape_mismatch)\n");
}

#[tokio::test]
async fn an_alias_that_is_removed_as_an_adapter_is_named_as_one() {
    let live = Live::start(&[]);
    assert_eq!(live.upload("pirate", 1).await.status, 201);
    let adapter = |args: &[&str]| {
        polylora(&[&["adapter"], args, &["--url", live.server.url.as_str()]].concat())
    };
    out(&adapter(&["alias", "prod", "pirate@1=1"]));
    let said = refused(&adapter(&["rm", "prod"]), 2);
    assert!(said.contains("prod is an alias"), "{said}");
    assert!(said.contains("'polylora adapter alias prod --rm'"), "{said}");
    let said = refused(&adapter(&["rm", "nobody"]), 1);
    assert!(said.contains("nobody") && !said.contains("alias nobody --rm"), "{said}");
    out(&adapter(&["alias", "prod", "--rm"]));
    out(&adapter(&["rm", "pirate"]));
}

#[test]
fn every_archive_that_the_server_unpacks_can_be_pushed() {
    let (url, seen) = server();
    let dir = tempfile::tempdir().expect("a directory");
    let names = ["a.gguf", "a.zip", "a.tar", "a.tar.gz", "a.tgz"];
    for name in names {
        let path = dir.path().join(name);
        std::fs::write(&path, "123").expect("written");
        out(&polylora(&["adapter", "push", "mine", &path.to_string_lossy(), "--url", &url]));
    }
    let seen = seen.lock().expect("lock");
    let pushed: Vec<&str> = seen.iter().filter_map(|(_, body)| body[0]["name"].as_str()).collect();
    assert_eq!(pushed, names);
    drop(seen);
    let path = dir.path().join("a.gz");
    std::fs::write(&path, "123").expect("written");
    let said = refused(&polylora(&["adapter", "push", "mine", &path.to_string_lossy()]), 2);
    assert!(said.contains(".tar.gz"), "{said}");
}
