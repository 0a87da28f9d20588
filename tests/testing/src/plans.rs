//! What a statement reads: the rows that its plan touches, and the tables that it reads as a whole.

use std::collections::BTreeMap;

use lethe_db::pool::{self, Session};
use serde_json::Value;
use tokio_postgres::types::ToSql;

use crate::world::World;

/// Every statement that the product runs, by name.
#[must_use]
pub fn all_statements() -> Vec<(&'static str, &'static str)> {
    [lethe_db::all_statements(), lethe_stores::all_statements()].concat()
}

/// What a statement has read.
#[derive(Debug, Default)]
pub struct Reading {
    /// Rows that scans have returned or thrown away.
    pub rows: u64,
    /// Tables that were read as a whole, each with the rows read.
    pub whole: Vec<(String, u64)>,
    /// Blocks touched, in memory or not.
    pub blocks: u64,
    /// The plan, for the one who reads a failure.
    pub plan: String,
}

/// Runs a named statement of a module under `EXPLAIN ANALYZE`, in a transaction that is rolled back.
pub async fn reading(
    world: &World,
    statements: &[(&str, &str)],
    name: &str,
    parameters: &[&(dyn ToSql + Sync)],
) -> Reading {
    let sql = statements.iter().find(|(one, _)| *one == name).unwrap_or_else(|| panic!("no statement {name}")).1;
    let session = world.db.session().await.unwrap();
    session.batch_execute("BEGIN").await.unwrap();
    let explain = format!("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}");
    let row = session.raw().query_one(&explain, parameters).await.unwrap_or_else(|error| panic!("{name}: {error:?}"));
    session.batch_execute("ROLLBACK").await.unwrap();
    of_plan(&row.get::<_, Value>(0))
}

/// Settings under which a statement is planned for what it is given.
pub const PLANNED: &str = "SET LOCAL plan_cache_mode = force_custom_plan";

/// The same of a statement whose parameters are written as SQL, their types and their values, under settings.
pub async fn explained(
    world: &World,
    statements: &[(&str, &str)],
    name: &str,
    types: &str,
    values: &str,
    settings: &str,
) -> Reading {
    let sql = statements.iter().find(|(one, _)| *one == name).unwrap_or_else(|| panic!("no statement {name}")).1;
    let session = world.db.session().await.unwrap();
    let prepare = format!("BEGIN; {settings}; PREPARE one ({types}) AS {sql}");
    session.batch_execute(&prepare).await.unwrap();
    let explain = format!("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE one ({values})");
    let row = session.raw().query_one(&explain, &[]).await.unwrap_or_else(|error| panic!("{name}: {error:?}"));
    session.batch_execute("ROLLBACK; DEALLOCATE one").await.unwrap();
    of_plan(&row.get(0))
}

/// Statements with plans that were made for anything, and are kept.
#[derive(Debug)]
pub struct Kept {
    session: Session,
    names: BTreeMap<&'static str, String>,
}

impl Kept {
    /// Prepares every statement of the product whose plan may be kept, and plans it for anything; what it is planned for is the
    /// database as it is now.
    pub async fn plan(world: &World) -> Self {
        let session = world.db.session().await.unwrap();
        session.batch_execute("SET plan_cache_mode = force_generic_plan").await.unwrap();
        let mut names = BTreeMap::new();
        for (number, (_, sql)) in all_statements().into_iter().enumerate().filter(|(_, (_, sql))| pool::is_kept(sql)) {
            let name = format!("kept_{number}");
            session.batch_execute(&format!("PREPARE {name} AS {sql}")).await.unwrap();
            let types = session.prepared(sql).await.unwrap().params().len();
            let nothing = if types == 0 { String::new() } else { format!("({})", vec!["NULL"; types].join(", ")) };
            session.batch_execute(&format!("EXPLAIN EXECUTE {name}{nothing}")).await.unwrap();
            names.insert(sql, name);
        }
        Self { session, names }
    }

    /// Every plan, by the text of its statement.
    pub async fn plans(&self) -> BTreeMap<&'static str, Value> {
        let mut plans = BTreeMap::new();
        for (sql, name) in &self.names {
            let types = self.session.prepared(sql).await.unwrap().params().len();
            let nothing = if types == 0 { String::new() } else { format!("({})", vec!["NULL"; types].join(", ")) };
            let explain = format!("EXPLAIN (FORMAT JSON) EXECUTE {name}{nothing}");
            plans.insert(*sql, self.session.raw().query_one(&explain, &[]).await.unwrap().get(0));
        }
        plans
    }

    /// What the statement reads by its kept plan, in a transaction that is rolled back; `None` where none is kept.
    pub async fn reading(&self, sql: &str, parameters: &[&(dyn ToSql + Sync)]) -> Option<Reading> {
        let name = self.names.get(sql)?;
        let types = self.session.prepared(sql).await.unwrap().params().to_vec();
        let mut values = Vec::new();
        for (parameter, of_type) in parameters.iter().zip(&types) {
            let literal = format!("SELECT quote_nullable($1::{of_type}::text) || '::{of_type}'");
            values.push(self.session.raw().query_one(&literal, &[*parameter]).await.unwrap().get::<_, String>(0));
        }
        let values = if values.is_empty() { String::new() } else { format!("({})", values.join(", ")) };
        self.session.batch_execute("BEGIN").await.unwrap();
        let explain = format!("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE {name}{values}");
        let row = self.session.raw().query_one(&explain, &[]).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        self.session.batch_execute("ROLLBACK").await.unwrap();
        Some(of_plan(&row.get(0)))
    }
}

fn of_plan(explained: &Value) -> Reading {
    let plan = &explained[0]["Plan"];
    let blocks = |name: &str| plan[name].as_u64().unwrap_or(0);
    let blocks = blocks("Shared Hit Blocks") + blocks("Shared Read Blocks");
    let mut reading = Reading { blocks, plan: plan.to_string(), ..Reading::default() };
    visit(plan, &mut reading);
    // The clock is one row.
    reading.whole.retain(|(table, _)| table != "clock");
    reading
}

fn visit(node: &Value, reading: &mut Reading) {
    let number = |name: &str| node[name].as_f64().unwrap_or(0.0);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "PostgreSQL counts rows")]
    let rows = ((number("Actual Rows") + number("Rows Removed by Filter") + number("Rows Removed by Index Recheck"))
        * number("Actual Loops")) as u64;
    if let Some(table) = node["Relation Name"].as_str() {
        reading.rows += rows;
        if node["Node Type"] == "Seq Scan" {
            reading.whole.push((table.to_owned(), rows));
        }
    }
    for child in node["Plans"].as_array().into_iter().flatten() {
        visit(child, reading);
    }
}

/// The blocks that a statement touched which returned `rows`: by `EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON)`.
pub fn touched(plan: &Value, rows: f64) -> u64 {
    let of = |name: &str| plan[0]["Plan"][name].as_u64().unwrap();
    // PostgreSQL 18 tells rows with fractions.
    let found = plan[0]["Plan"]["Actual Rows"].as_f64().unwrap();
    assert!((found - rows).abs() < 0.1, "{plan}");
    of("Shared Hit Blocks") + of("Shared Read Blocks")
}
