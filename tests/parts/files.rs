//! Files without a server: what jobs hold stays, what they made is there, contents go with the last
//! file that has them.

use polylora::database::Storage;
use polylora::error::Error;
use polylora::files::{FileLimits, FileRow, Files, NewFile, Page, Purpose};
use std::io::Read;
use std::path::Path;

const LIMITS: FileLimits =
    FileLimits { file_bytes_max: 1 << 20, files_max: 8, uploads_max: 4, check: |_| None };

async fn open(dir: &Path) -> Files {
    Files::open(&Storage::of(dir), LIMITS).await.expect("opened")
}

async fn add(files: &Files, tenant: Option<&str>, text: &str) -> Result<FileRow, Error> {
    let mut incoming = files.receive(tenant)?;
    incoming.write(text.as_bytes())?;
    let new = NewFile {
        tenant: tenant.map(str::to_owned),
        name: "a".to_owned(),
        purpose: Purpose::FineTune,
        lifetime: None,
    };
    files.add(incoming.finish()?, new).await
}

fn contents(dir: &Path) -> usize {
    let all = std::fs::read_dir(dir.join("files/sha256")).expect("a directory").flatten();
    all.map(|prefix| std::fs::read_dir(prefix.path()).expect("a directory").count()).sum()
}

#[tokio::test]
async fn a_file_that_a_job_holds_cannot_be_deleted_until_the_last_guard_is_gone() {
    let dir = tempfile::tempdir().expect("a directory");
    let files = open(dir.path()).await;
    let file = add(&files, Some("acme"), "{}").await.expect("a file");
    let (one, mut content, held) = files.open_for(&file.id, Some("acme")).await.expect("held");
    let (two, _, _) = files.open_for(&file.id, None).await.expect("by an operator's job too");
    let mut text = String::new();
    content.read_to_string(&mut text).expect("read");
    assert_eq!((text.as_str(), held), ("{}", file.clone()));
    let foreign = files.open_for(&file.id, Some("globex")).await.map(drop).expect_err("not theirs");
    assert_eq!(foreign.code, "file_not_found");
    for guard in [one, two] {
        let refused = files.remove(&file.id, Some("acme")).await.expect_err("in use");
        assert_eq!(refused.code, "file_in_use");
        drop(guard);
    }
    files.remove(&file.id, Some("acme")).await.expect("free");
    assert_eq!((contents(dir.path()), files.bytes_of("acme")), (0, 0));
    let gone = files.open_for(&file.id, None).await.map(drop).expect_err("gone");
    assert_eq!(gone.code, "file_not_found");
}

#[tokio::test]
async fn a_jobs_result_is_its_tenants_and_no_bound_keeps_it_out() {
    let dir = tempfile::tempdir().expect("a directory");
    let files = open(dir.path()).await;
    for n in 0..4 {
        add(&files, Some("acme"), &format!("{n}")).await.expect("a file");
    }
    let refused = add(&files, Some("acme"), "5").await.expect_err("half of eight");
    assert_eq!(refused.code, "tenant_share_exceeded");
    for n in 0..4 {
        add(&files, None, &format!("{n}")).await.expect("an operator's may be all that is left");
    }
    let refused = add(&files, None, "5").await.expect_err("eight");
    assert_eq!(refused.code, "file_limit_reached");
    assert_eq!(contents(dir.path()), 4, "equal contents are there once");
    let csv = b"step,train_loss\n1,2.5\n".to_vec();
    let made = files.add_result(Some("acme"), "step_metrics.csv", csv.clone()).await;
    let made = made.expect("a result");
    assert_eq!((made.purpose, made.problem.as_deref()), (Purpose::FineTuneResults, None));
    assert_eq!(files.bytes_of("acme"), 4 + csv.len() as u64);
    let page = Page { purpose: Some(Purpose::FineTuneResults), limit: 9, ..Page::default() };
    let (results, more) = files.page(Some("acme"), &page).await.expect("a page");
    assert_eq!((results, more), (vec![made.clone()], false));
    // As they were, after a restart.
    drop(files);
    let files = open(dir.path()).await;
    assert_eq!(files.bytes_of("acme"), 4 + csv.len() as u64);
    let (row, mut content) = files.open_content(&made.id, Some("acme")).await.expect("there");
    let mut bytes = Vec::new();
    content.read_to_end(&mut bytes).expect("read");
    assert_eq!((row, bytes), (made, csv));
}

#[tokio::test]
async fn an_equal_content_that_comes_while_another_goes_stays() {
    let dir = tempfile::tempdir().expect("a directory");
    let files = open(dir.path()).await;
    for _ in 0..20 {
        let old = add(&files, Some("acme"), "{}").await.expect("a file");
        let (removed, added) =
            tokio::join!(files.remove(&old.id, None), add(&files, Some("globex"), "{}"));
        removed.expect("removed");
        let new = added.expect("added");
        files.open_content(&new.id, Some("globex")).await.expect("its content is there");
        files.remove(&new.id, None).await.expect("removed");
        assert_eq!(contents(dir.path()), 0);
    }
}

#[tokio::test]
async fn what_no_row_names_is_set_aside_at_a_start_and_what_is_named_stays() {
    let dir = tempfile::tempdir().expect("a directory");
    let files = open(dir.path()).await;
    let kept = add(&files, None, "{\"prompt\": 1, \"completion\": 2}").await.expect("a file");
    drop(files);
    // As a kill between the content's move and its row leaves it, and one between parts.
    let digest = "ab".repeat(32);
    let stray = dir.path().join("files/sha256/ab").join(&digest);
    std::fs::create_dir_all(&stray).expect("a directory");
    std::fs::write(stray.join("content"), "x").expect("written");
    let mark = format!("files/incoming/naming-{digest}");
    for path in [mark.as_str(), "files/incoming/7", "files/parts/part_0"] {
        std::fs::write(dir.path().join(path), "half").expect("written");
    }
    let files = open(dir.path()).await;
    files.open_content(&kept.id, None).await.expect("there");
    assert!(!stray.exists());
    let aside = std::fs::read_dir(dir.path().join("orphans")).expect("a directory").count();
    assert_eq!((contents(dir.path()), aside), (1, 1), "the prefix is empty but for the kept");
    for below in ["files/incoming", "files/parts"] {
        assert_eq!(std::fs::read_dir(dir.path().join(below)).expect("there").count(), 0);
    }
}
