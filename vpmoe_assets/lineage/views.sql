-- Views of the index. Those that follow the lineage of one record are macros, which DuckDB calls like tables:
-- SELECT * FROM ancestors_of('…').

CREATE VIEW latest AS
SELECT * FROM artifacts
QUALIFY row_number() OVER (PARTITION BY experiment, asset ORDER BY sequence DESC) = 1;

-- Everything an artifact came from, however far: depth 1 is its own inputs, the shortest way counts. Followed from
-- record to record, within the index: behind a version that is gone, `vpmoe lineage` goes on. acceptances are the
-- statements on which the ways from it rest.
CREATE VIEW ancestors AS
WITH RECURSIVE walk AS (
    SELECT record_digest, input_record_digest AS ancestor_record_digest, acceptance, 1 AS depth
    FROM inputs WHERE kind = 'input'
    UNION
    SELECT walk.record_digest, up.input_record_digest, up.acceptance, walk.depth + 1
    FROM walk
    JOIN inputs AS up ON up.record_digest = walk.ancestor_record_digest AND up.kind = 'input'
    WHERE walk.depth < 10000            -- records cannot form a circle; a forged index could
),
shortest AS (
    SELECT record_digest, ancestor_record_digest, min(depth) AS depth,
           coalesce(list(DISTINCT acceptance) FILTER (acceptance IS NOT NULL), []) AS acceptances
    FROM walk
    GROUP BY record_digest, ancestor_record_digest
),
named AS (
    SELECT DISTINCT input_record_digest, input_experiment, input_asset, input_version, input_digest
    FROM inputs WHERE kind = 'input'
)
SELECT a.experiment, a.asset, a.version, record_digest,
       named.input_experiment AS ancestor_experiment, named.input_asset AS ancestor_asset,
       named.input_version AS ancestor_version, named.input_digest AS ancestor_digest, ancestor_record_digest,
       depth, acceptances
FROM shortest
JOIN artifacts AS a USING (record_digest)
JOIN named ON named.input_record_digest = ancestor_record_digest;

-- The same from the other end: everything that was made from an artifact, also from one that is gone.
CREATE VIEW descendants AS
SELECT ancestor_experiment AS experiment, ancestor_asset AS asset, ancestor_version AS version,
       ancestor_record_digest AS record_digest,
       experiment AS descendant_experiment, asset AS descendant_asset, version AS descendant_version,
       record_digest AS descendant_record_digest, depth
FROM ancestors;

-- Of one record alone, which costs as much as the answer is long.
CREATE MACRO ancestors_of(record) AS TABLE
WITH RECURSIVE walk AS (
    SELECT input_record_digest AS digest, 1 AS depth FROM inputs WHERE record_digest = record AND kind = 'input'
    UNION
    SELECT up.input_record_digest, walk.depth + 1
    FROM walk JOIN inputs AS up ON up.record_digest = walk.digest AND up.kind = 'input'
    WHERE walk.depth < 10000
),
named AS (
    SELECT DISTINCT input_record_digest, input_experiment, input_asset, input_version, input_digest
    FROM inputs WHERE kind = 'input'
)
SELECT any_value(input_experiment) AS experiment, any_value(input_asset) AS asset,
       any_value(input_version) AS version, walk.digest AS record_digest, any_value(input_digest) AS digest,
       min(depth) AS depth
FROM walk JOIN named ON named.input_record_digest = walk.digest
GROUP BY walk.digest
ORDER BY depth, asset, version;

CREATE MACRO descendants_of(record) AS TABLE
WITH RECURSIVE walk AS (
    SELECT record_digest AS digest, 1 AS depth FROM inputs WHERE input_record_digest = record AND kind = 'input'
    UNION
    SELECT down.record_digest, walk.depth + 1
    FROM walk JOIN inputs AS down ON down.input_record_digest = walk.digest AND down.kind = 'input'
    WHERE walk.depth < 10000
)
SELECT a.experiment, a.asset, a.version, a.record_digest, a.digest, min(walk.depth) AS depth
FROM walk JOIN artifacts AS a ON a.record_digest = walk.digest
GROUP BY ALL
ORDER BY depth, asset, version;

-- The name that ancestors had.
CREATE VIEW ancestry AS
SELECT experiment, asset, version, ancestor_asset, ancestor_version, ancestor_digest, ancestor_record_digest,
       depth, acceptances
FROM ancestors;

-- Everything that the latest versions came from: what the views below ask for, without the rest.
CREATE VIEW latest_ancestors AS
WITH RECURSIVE walk AS (
    SELECT record_digest, input_record_digest AS ancestor_record_digest, acceptance, 1 AS depth
    FROM inputs
    WHERE kind = 'input' AND record_digest IN (SELECT record_digest FROM latest)
    UNION
    SELECT walk.record_digest, up.input_record_digest, up.acceptance, walk.depth + 1
    FROM walk
    JOIN inputs AS up ON up.record_digest = walk.ancestor_record_digest AND up.kind = 'input'
    WHERE walk.depth < 10000
),
named AS (
    SELECT DISTINCT input_record_digest, input_asset, input_version, input_digest
    FROM inputs WHERE kind = 'input'
)
SELECT a.experiment, a.asset, a.version, record_digest, named.input_asset AS ancestor_asset,
       named.input_version AS ancestor_version, named.input_digest AS ancestor_digest, ancestor_record_digest,
       min(depth) AS depth,
       coalesce(list(DISTINCT acceptance) FILTER (acceptance IS NOT NULL), []) AS acceptances
FROM walk
JOIN artifacts AS a USING (record_digest)
JOIN named ON named.input_record_digest = ancestor_record_digest
GROUP BY ALL;

-- What a person has accepted as the equivalent of what other code or another recipe would make.
CREATE VIEW acceptances AS
SELECT experiment, asset, version, record_digest, id, author, reason, time_utc, in_force, body
FROM statements
WHERE kind = 'accepted';

-- Why the latest version of an asset is not what a new materialisation would give or gave:
--   input        an input has a newer version with other content
--   ancestor     the same, further up
--   recipe       recipe or sources differ from those of the version before
--   acceptance   an ancestor was taken because a person had accepted it, which was withdrawn or refuted since
-- acceptances are those in force about the version itself: it is reused for other code by them. What present code
-- would make is not in here: `vpmoe ls` and `vpmoe why` compare with that.
CREATE VIEW drift AS
WITH up AS MATERIALIZED (
    SELECT latest_ancestors.*, latest.version AS current_version, latest.digest AS current_digest
    FROM latest_ancestors
    LEFT JOIN latest ON latest.experiment = latest_ancestors.experiment AND latest.asset = ancestor_asset
),
versions AS (
    SELECT experiment, asset, version, record_digest, code_version, sequence,
           lag(version) OVER in_order AS before, lag(code_version) OVER in_order AS code_before,
           lead(version) OVER in_order AS after
    FROM artifacts
    WINDOW in_order AS (PARTITION BY experiment, asset ORDER BY sequence)
),
reasons AS (
    SELECT experiment, asset, version, record_digest,
           CASE WHEN depth = 1 THEN 'input' ELSE 'ancestor' END AS reason,
           ancestor_asset AS cause, ancestor_version AS used_version, current_version
    FROM up
    WHERE current_digest <> ancestor_digest
    UNION ALL
    SELECT experiment, asset, version, record_digest, 'recipe', asset, before, version
    FROM versions
    WHERE after IS NULL AND code_before <> code_version
    UNION ALL
    SELECT DISTINCT up.experiment, up.asset, up.version, up.record_digest, 'acceptance', ancestor_asset,
           ancestor_version, current_version
    FROM (SELECT *, unnest(acceptances) AS acceptance FROM up) AS up
    JOIN acceptances AS said ON said.id = up.acceptance AND NOT said.in_force
),
own AS (SELECT record_digest, list(id) AS ids FROM acceptances WHERE in_force GROUP BY record_digest)
SELECT experiment, asset, version, reason, cause, used_version, current_version,
       coalesce(own.ids, []) AS acceptances
FROM reasons
LEFT JOIN own USING (record_digest);

-- The rungs: latest checkpoints (whatever reports its parameters), in the order in which they come from each other.
CREATE VIEW ladder AS
WITH numbers AS (
    SELECT record_digest,
           any_value(value) FILTER (name = 'parameters') AS parameters,
           any_value(value) FILTER (name = 'num_layers') AS layers,
           any_value(value) FILTER (name = 'hidden_size') AS hidden_size,
           any_value(value) FILTER (name = 'active_parameters') AS active_parameters,
           any_value(value) FILTER (name = 'loss') AS loss,
           any_value(value) FILTER (name = 'valid_loss') AS valid_loss
    FROM metrics
    GROUP BY record_digest
    HAVING parameters IS NOT NULL
),
behind AS (
    SELECT up.record_digest,
           count(DISTINCT up.ancestor_asset) FILTER (of_it.record_digest IS NOT NULL) AS rung,
           flatten(list(up.acceptances)) AS acceptances
    FROM latest_ancestors AS up
    LEFT JOIN numbers AS of_it ON of_it.record_digest = up.ancestor_record_digest
    GROUP BY up.record_digest
),
own AS (SELECT record_digest, list(id) AS ids FROM acceptances WHERE in_force GROUP BY record_digest)
SELECT c.experiment, coalesce(behind.rung, 0) AS rung, c.asset, c.version,
       CAST(n.layers AS INTEGER) AS layers, CAST(n.hidden_size AS INTEGER) AS hidden_size,
       CAST(n.parameters AS BIGINT) AS parameters, CAST(n.active_parameters AS BIGINT) AS active_parameters,
       n.loss, n.valid_loss, c.blocked, c.digest, c.published_utc,
       -- Statements of persons on which it or anything that it came from rests.
       list_sort(list_distinct(coalesce(behind.acceptances, []) || coalesce(own.ids, []))) AS acceptances,
       c.record_digest
FROM latest AS c
JOIN numbers AS n USING (record_digest)
LEFT JOIN behind USING (record_digest)
LEFT JOIN own USING (record_digest)
ORDER BY c.experiment, rung, c.asset;

-- What each rung cost: the time that was worked on it, and on everything that it came from, each counted once. What
-- names another's files again costs what those did.
CREATE VIEW cost AS
WITH behind AS (
    SELECT up.record_digest, sum(duration_s) AS duration_s, count(*) AS ancestors
    FROM latest_ancestors AS up
    JOIN runs ON runs.record_digest = up.ancestor_record_digest
    GROUP BY up.record_digest
)
SELECT l.experiment, l.rung, l.asset, l.version, r.duration_s / 3600 AS hours,
       (r.duration_s + coalesce(behind.duration_s, 0)) / 3600 AS hours_with_ancestry,
       coalesce(behind.ancestors, 0) AS ancestors, r.device,
       CAST(coalesce(r.execution->>'nproc', '1') AS INTEGER) AS processes,
       (SELECT count(*) FROM attempts WHERE attempts.record_digest = l.record_digest) AS attempts, l.record_digest
FROM ladder AS l
JOIN runs AS r USING (record_digest)
LEFT JOIN behind USING (record_digest)
ORDER BY l.experiment, l.rung, l.asset;

-- Everything that happened, by time: versions, and what differs from the version before, and what was said.
CREATE VIEW changes AS
SELECT published_utc AS time_utc, experiment, asset, version, record_digest,
       CASE WHEN lag(digest) OVER in_order IS NULL THEN 'first version'
            WHEN lag(digest) OVER in_order = digest THEN 'same content'
            ELSE 'new content' END AS change,
       lag(version) OVER in_order AS version_before,
       coalesce(lag(recipe_digest) OVER in_order <> recipe_digest, false) AS other_recipe,
       coalesce(lag(code_version) OVER in_order <> code_version
                AND lag(recipe_digest) OVER in_order = recipe_digest, false) AS other_code,
       NULL AS author, NULL AS reason
FROM artifacts
WINDOW in_order AS (PARTITION BY experiment, asset ORDER BY sequence)
UNION ALL
SELECT time_utc, experiment, asset, version, record_digest, kind, NULL, false, false, author, reason
FROM statements;

-- What was the latest at either date (from < the time <= until), and how the two differ.
CREATE MACRO changed_between(since, until) AS TABLE
WITH then_ AS (
    SELECT * FROM artifacts WHERE published_utc <= CAST(since AS TIMESTAMP)
    QUALIFY row_number() OVER (PARTITION BY experiment, asset ORDER BY sequence DESC) = 1
),
now_ AS (
    SELECT * FROM artifacts WHERE published_utc <= CAST(until AS TIMESTAMP)
    QUALIFY row_number() OVER (PARTITION BY experiment, asset ORDER BY sequence DESC) = 1
)
SELECT experiment, asset, then_.version AS version_then, now_.version AS version_now,
       then_.digest IS DISTINCT FROM now_.digest AS other_content,
       then_.recipe_digest IS DISTINCT FROM now_.recipe_digest AS other_recipe,
       then_.source_digest IS DISTINCT FROM now_.source_digest AS other_sources,
       then_.record_digest AS record_then, now_.record_digest AS record_now
FROM now_
LEFT JOIN then_ USING (experiment, asset)
WHERE then_.record_digest IS DISTINCT FROM now_.record_digest
ORDER BY experiment, asset;

-- Every checkpoint that came, however far, of a data set with a shard: by the shard's name, or the sha256 of it or
-- of one of its files.
CREATE MACRO saw_shard(shard) AS TABLE
WITH RECURSIVE holds AS (
    SELECT DISTINCT record_digest, version AS of_version, asset AS of_asset
    FROM shards
    WHERE name = shard OR (length(shard) = 64 AND contains(CAST(sha256 AS VARCHAR), shard))
),
walk AS (
    SELECT record_digest AS digest, of_asset, of_version, 0 AS depth FROM holds
    UNION
    SELECT down.record_digest, walk.of_asset, walk.of_version, walk.depth + 1
    FROM walk
    JOIN inputs AS down ON down.input_record_digest = walk.digest AND down.kind = 'input'
    WHERE walk.depth < 10000
)
SELECT a.experiment, a.asset, a.version, of_asset AS data, of_version AS data_version, min(depth) AS depth,
       a.record_digest
FROM walk
JOIN artifacts AS a ON a.record_digest = walk.digest
JOIN metrics AS m ON m.record_digest = walk.digest AND m.name = 'parameters'
GROUP BY ALL
ORDER BY a.experiment, data, data_version, depth, a.asset, a.version;

-- Who scores best; for an object that was evaluated several times the newest evaluation counts.
CREATE VIEW leaderboard AS
WITH newest AS (
    SELECT e.*
    FROM evals AS e
    JOIN artifacts AS a USING (record_digest)
    QUALIFY row_number() OVER (
        PARTITION BY e.experiment, e.object_asset, e.object_version, e.suite, e.task
        ORDER BY a.published_utc DESC, a.sequence DESC) = 1
)
SELECT experiment, suite, task,
       rank() OVER (PARTITION BY experiment, suite, task ORDER BY score DESC) AS place,
       object_asset, object_version, score, centered, correct, total, stderr,
       asset AS eval_asset, version AS eval_version
FROM newest
ORDER BY experiment, suite, task, place, object_asset;

-- A line for each profile: how fast, on what. The parts of a step are in `phases`, all else in `perf`.
CREATE VIEW speed AS
SELECT experiment, asset, version, any_value(device) AS device,
       any_value(value) FILTER (name = 'ms_per_step/p50') AS step_ms,
       any_value(value) FILTER (name = 'tokens_per_s') AS tokens_per_s,
       any_value(value) FILTER (name = 'mfu') AS mfu,
       any_value(value) FILTER (name = 'peak_mem_bytes') / 1024 ** 3 AS peak_gib,
       record_digest
FROM perf
GROUP BY experiment, asset, version, record_digest
HAVING step_ms IS NOT NULL OR tokens_per_s IS NOT NULL;

CREATE VIEW phases AS
SELECT experiment, asset, version, device, name[7:] AS phase, value AS ms, record_digest
FROM perf
WHERE name LIKE 'parts/%';
