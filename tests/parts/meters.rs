//! Rates, places and quotas, to the millisecond: the clock is an argument.

use polylora::access::{Access, Caller, Limits, NewKey, Scope};
use polylora::clock::Now;
use std::time::Duration;

/// 2026-03-31 23:00:00 UTC: an hour before a day's and a month's end.
const NOW: Duration = Duration::from_secs(1_774_998_000);

fn at(ms: u64) -> Duration {
    NOW + Duration::from_millis(ms)
}

async fn access(dir: &tempfile::TempDir) -> Access {
    Access::open(dir.path(), Some("configured")).await.unwrap()
}

async fn caller(access: &Access, limits: Limits) -> Caller {
    let scopes = vec![Scope::Inference];
    let new = NewKey { scopes, weight: 1, limits, ..NewKey::default() };
    let (_, secret) = access.create(new, NOW).await.unwrap();
    access.authenticate(Some(secret.reveal()), NOW).unwrap()
}

fn code(refused: polylora::error::Result<polylora::access::Ticket>) -> (&'static str, Option<u64>) {
    refused.map(|_| ("admitted", None)).unwrap_or_else(|e| (e.code, e.retry_after))
}

#[tokio::test]
async fn a_minute_of_requests_fills_evenly() {
    let dir = tempfile::tempdir().unwrap();
    let access = access(&dir).await;
    let limits = Limits { requests_per_minute: Some(6), ..Limits::default() };
    let who = caller(&access, limits).await;
    let ask = |ms| code(access.admit(&who, None, 10, at(ms).into()));
    for _ in 0..6 {
        assert_eq!(ask(0).0, "admitted");
    }
    assert_eq!(ask(0), ("rate_limit_exceeded", Some(10)));
    assert_eq!(ask(9_999), ("rate_limit_exceeded", Some(1)));
    assert_eq!(ask(10_000).0, "admitted");
    assert_eq!(ask(10_000), ("rate_limit_exceeded", Some(10)));
    let left = access.standing(&who, at(25_000).into()).requests.unwrap();
    assert_eq!((left.limit, left.remaining, left.reset_ms), (6, 1, 45_000));
}

#[tokio::test]
async fn tokens_are_reserved_whole_and_settled_to_what_was_used() {
    let dir = tempfile::tempdir().unwrap();
    let access = access(&dir).await;
    let limits = Limits { tokens_per_minute: Some(600), ..Limits::default() };
    let who = caller(&access, limits).await;
    let mut first = access.admit(&who, None, 500, NOW.into()).unwrap();
    assert_eq!(code(access.admit(&who, None, 200, NOW.into())), ("rate_limit_exceeded", Some(10)));
    first.used(50);
    drop(first);
    assert_eq!(access.standing(&who, NOW.into()).tokens.unwrap().remaining, 550);
    assert_eq!(code(access.admit(&who, None, 601, NOW.into())), ("request_exceeds_limit", None));
    // A refusal takes nothing, and neither does a request that never ran.
    drop(access.admit(&who, None, 550, NOW.into()).unwrap());
    assert_eq!(access.standing(&who, NOW.into()).tokens.unwrap().remaining, 550);
}

#[tokio::test]
async fn places_are_given_back_and_an_adapters_limits_hold_over_all_keys() {
    let dir = tempfile::tempdir().unwrap();
    let access = access(&dir).await;
    let one = Limits { concurrent_max: Some(1), ..Limits::default() };
    let (a, b) = (caller(&access, one.clone()).await, caller(&access, Limits::default()).await);
    let held = access.admit(&a, None, 1, NOW.into()).unwrap();
    assert_eq!(code(access.admit(&a, None, 1, NOW.into())), ("rate_limit_exceeded", Some(1)));
    drop(held);
    access.set_limits("sql", one).await.unwrap();
    let held = access.admit(&b, Some("sql"), 1, NOW.into()).unwrap();
    assert_eq!(code(access.admit(&a, Some("sql"), 1, NOW.into())).0, "rate_limit_exceeded");
    // Refused by the adapter, so the key's own place is free.
    let other = access.admit(&a, Some("pirate"), 1, NOW.into()).unwrap();
    drop((held, other));
    access.set_limits("sql", Limits::default()).await.unwrap();
    let both = [
        access.admit(&b, Some("sql"), 1, NOW.into()),
        access.admit(&b, Some("sql"), 1, NOW.into()),
    ];
    assert!(both.iter().all(Result::is_ok));
}

#[tokio::test]
async fn quotas_end_with_their_period_and_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let first = access(&dir).await;
    let limits =
        Limits { tokens_per_day: Some(100), tokens_per_month: Some(150), ..Limits::default() };
    let scopes = vec![Scope::Inference];
    let new = NewKey { scopes, weight: 1, limits, ..NewKey::default() };
    let (_, secret) = first.create(new, NOW).await.unwrap();
    let who = first.authenticate(Some(secret.reveal()), NOW).unwrap();
    let mut ticket = first.admit(&who, None, 90, NOW.into()).unwrap();
    assert_eq!(code(first.admit(&who, None, 20, NOW.into())), ("quota_exceeded", Some(3600)));
    ticket.used(70);
    drop(ticket);
    first.flush().await.unwrap();
    drop((first, who));

    let again = access(&dir).await;
    let who = again.authenticate(Some(secret.reveal()), NOW).unwrap();
    assert_eq!(code(again.admit(&who, None, 31, NOW.into())).0, "quota_exceeded");
    let mut ticket = again.admit(&who, None, 30, NOW.into()).unwrap();
    ticket.used(30);
    drop(ticket);
    again.flush().await.unwrap();
    again.flush().await.unwrap();
    let midnight = at(3_600_000);
    // A day earlier in April the month's quota holds; at midnight of the month both begin anew.
    assert_eq!(code(again.admit(&who, None, 100, midnight.into())).0, "admitted");
    let day = Duration::from_secs(86_400);
    let mut ticket = again.admit(&who, None, 100, midnight.into()).unwrap();
    ticket.used(100);
    drop(ticket);
    let (refused, after) = code(again.admit(&who, None, 51, (midnight + day).into()));
    assert_eq!((refused, after), ("quota_exceeded", Some(29 * 86_400)), "of the month");
    assert_eq!(code(again.admit(&who, None, 50, (midnight + day).into())).0, "admitted");
}

#[tokio::test]
async fn the_audit_log_can_only_grow() {
    use polylora::access::audit::{Query, Record};
    let dir = tempfile::tempdir().unwrap();
    let access = access(&dir).await;
    let record = |tenant: Option<&str>| Record {
        id: 0,
        at: 5,
        key: "key-1".into(),
        tenant: tenant.map(str::to_owned),
        action: "PUT /v1/adapters/{name}".into(),
        name: Some("sql".into()),
        digest: Some("sha256:ab".into()),
        outcome: "ok".into(),
        status: 201,
        request_id: "req-1".into(),
        count: 1,
    };
    for tenant in [None, Some("acme"), Some("globex")] {
        access.record(&record(tenant)).await.unwrap();
    }
    let all = Query { limit: 10, ..Query::default() };
    let ids = |records: Vec<Record>| records.iter().map(|r| r.id).collect::<Vec<_>>();
    assert_eq!(ids(access.records(&all).await.unwrap()), [3, 2, 1]);
    let of = Query { tenant: Some("acme".into()), ..all.clone() };
    let seen = access.records(&of).await.unwrap();
    assert_eq!(seen, [Record { id: 2, ..record(Some("acme")) }]);
    assert_eq!(ids(access.records(&Query { before: Some(2), ..all }).await.unwrap()), [1]);
    let storage = polylora::database::Storage::of(dir.path());
    let database = polylora::database::Database::catalogue(&storage).await.unwrap();
    for statement in ["UPDATE audit SET key = 'x'", "DELETE FROM audit"] {
        let refused = database.run(sqlx::query(statement)).await.unwrap_err();
        assert!(refused.to_string().contains("append-only"), "{refused}");
    }
}

/// The wall's clock may be set; `ms` have passed.
fn set(wall: Duration, ms: u64) -> Now {
    Now { wall, monotonic: Duration::from_millis(ms) }
}

const DAY: Duration = Duration::from_secs(86_400);

#[tokio::test]
async fn a_rate_goes_on_whatever_the_wall_says() {
    let dir = tempfile::tempdir().unwrap();
    let access = access(&dir).await;
    let limits = Limits { requests_per_minute: Some(5), ..Limits::default() };
    let who = caller(&access, limits).await;
    let ask = |now: Now| code(access.admit(&who, None, 10, now));
    for _ in 0..5 {
        assert_eq!(ask(set(NOW, 0)).0, "admitted");
    }
    // A day ahead gives nothing before its time, and back again takes nothing away.
    assert_eq!(ask(set(NOW + DAY, 1)), ("rate_limit_exceeded", Some(12)));
    assert_eq!(ask(set(NOW + DAY, 12_000)).0, "admitted");
    assert_eq!(ask(set(NOW, 12_001)), ("rate_limit_exceeded", Some(12)));
    assert_eq!(ask(set(NOW, 24_000)).0, "admitted");
    assert_eq!(ask(set(NOW - 400 * DAY, 36_000)).0, "admitted");
}

#[tokio::test]
async fn a_quota_used_up_ahead_of_time_is_back_with_the_next_day_of_the_wall() {
    let dir = tempfile::tempdir().unwrap();
    let first = access(&dir).await;
    let limits = Limits { tokens_per_day: Some(100), ..Limits::default() };
    let scopes = vec![Scope::Inference];
    let new = NewKey { scopes, weight: 1, limits, ..NewKey::default() };
    let (_, secret) = first.create(new, NOW).await.unwrap();
    let use_up = |access: &Access, now: Now| {
        let who = access.authenticate(Some(secret.reveal()), NOW).unwrap();
        access.admit(&who, None, 100, now).map(|mut ticket| ticket.used(100)).map_err(|e| e.code)
    };
    assert_eq!(use_up(&first, set(NOW + 90 * DAY, 0)), Ok(()));
    assert_eq!(use_up(&first, set(NOW + 90 * DAY, 1)), Err("quota_exceeded"));
    // Back: what was used stays used today, and no longer.
    assert_eq!(use_up(&first, set(NOW, 2)), Err("quota_exceeded"));
    first.flush().await.unwrap();
    drop(first);
    let again = access(&dir).await;
    assert_eq!(use_up(&again, set(NOW, 3)), Err("quota_exceeded"));
    assert_eq!(use_up(&again, set(NOW + DAY, 4)), Ok(()));
    // A request that runs while the clock is set back holds nothing for ever.
    let who = again.authenticate(Some(secret.reveal()), NOW).unwrap();
    let running = again.admit(&who, None, 100, set(NOW + 5 * DAY, 5)).unwrap();
    assert_eq!(use_up(&again, set(NOW + 3 * DAY, 6)), Ok(()));
    drop(running);
    assert_eq!(use_up(&again, set(NOW + 4 * DAY, 7)), Ok(()));
}
