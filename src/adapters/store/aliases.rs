//! Aliases in the catalogue: one row each, targets as JSON.
//!
//! Owns that table's statements. Never knows how an alias chooses. The thing to know: a row holds
//! what the alias is and what it was before, so both change in one statement.

use super::Store;
use super::rows::{disown, json, number, own, text};
use crate::adapters::alias::{Alias, Target};
use crate::error::{Error, Result};
use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;

impl Store {
    /// Adds an alias or replaces it.
    pub async fn put_alias(&self, alias: &Alias) -> Result<()> {
        let mut t = self.begin().await?;
        let change = sqlx::query(
            "INSERT OR REPLACE INTO aliases (alias, targets, previous, created, updated)
             VALUES (?, ?, ?, ?, ?)",
        )
        .bind(&alias.name)
        .bind(json(&alias.targets)?)
        .bind(alias.previous.as_ref().map(json).transpose()?)
        .bind(alias.created as i64)
        .bind(alias.updated as i64);
        t.run(change).await?;
        own(&alias.name, &alias.owner, &mut t).await?;
        t.commit().await
    }

    pub async fn remove_alias(&self, name: &str) -> Result<()> {
        let mut t = self.begin().await?;
        t.run(sqlx::query("DELETE FROM aliases WHERE alias = ?").bind(name)).await?;
        disown(name, &mut t).await?;
        t.commit().await
    }

    pub(super) async fn aliases(&self) -> Result<Vec<Alias>> {
        let query = sqlx::query("SELECT * FROM aliases ORDER BY alias");
        let rows = self.catalogue.rows(query).await?;
        rows.iter().map(alias).collect()
    }
}

fn alias(row: &SqliteRow) -> Result<Alias> {
    let targets = |json: &str| -> Result<Vec<Target>> {
        serde_json::from_str(json)
            .map_err(|e| Error::fault(format!("polylora.db: an alias has bad targets: {e}")))
    };
    let previous: Option<String> = row.try_get("previous")?;
    Ok(Alias {
        name: text(row, "alias")?,
        owner: Default::default(),
        targets: targets(&text(row, "targets")?)?,
        previous: previous.as_deref().map(targets).transpose()?,
        created: number(row, "created")?,
        updated: number(row, "updated")?,
    })
}
