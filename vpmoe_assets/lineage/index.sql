-- The index of all records. Derived from them alone: `vpmoe index rebuild` makes it again at any time.
-- (experiment, asset, version) is the key of an artifact everywhere. Digests are sha256 in hex, sizes bytes,
-- times UTC, durations seconds, losses nats per token.

CREATE TABLE meta (schema_version INTEGER NOT NULL);

CREATE TABLE artifacts (
    experiment VARCHAR NOT NULL, asset VARCHAR NOT NULL, version VARCHAR NOT NULL,
    sequence INTEGER NOT NULL,          -- the highest of an asset is its latest
    fingerprint VARCHAR NOT NULL,       -- how it was made: recipe, sources, inputs
    code_version VARCHAR NOT NULL,      -- the same without the inputs
    recipe_digest VARCHAR NOT NULL,     -- the recipe alone
    digest VARCHAR NOT NULL,            -- what it is: Merkle root of the payload
    record_digest VARCHAR NOT NULL,
    manifest_digest VARCHAR,            -- of the manifest's content without volatile fields
    bytes BIGINT NOT NULL, files INTEGER NOT NULL,
    published_utc TIMESTAMP NOT NULL,
    blocked BOOLEAN NOT NULL,           -- a blocking check failed
    seed BIGINT,
    git_sha VARCHAR NOT NULL, git_dirty BOOLEAN NOT NULL, patch_digest VARCHAR, source_digest VARCHAR NOT NULL,
    recipe JSON NOT NULL, details JSON NOT NULL,
    schema VARCHAR NOT NULL,            -- of the record
    original_experiment VARCHAR, original_asset VARCHAR, original_version VARCHAR,
    original_record_digest VARCHAR,     -- whose files these are, where they were not made anew
    objects JSON NOT NULL,              -- sha256 of what is kept of sources, configuration and packages
    PRIMARY KEY (experiment, asset, version)
);

CREATE TABLE runs (                     -- the run that made each artifact
    experiment VARCHAR NOT NULL, asset VARCHAR NOT NULL, version VARCHAR NOT NULL,
    dagster_run_id VARCHAR, command VARCHAR NOT NULL,
    started_utc TIMESTAMP NOT NULL, finished_utc TIMESTAMP NOT NULL,
    duration_s DOUBLE NOT NULL,         -- worked, over all attempts; pauses between them do not count
    device VARCHAR, host VARCHAR, python VARCHAR, torch VARCHAR, megatron_core VARCHAR, cuda VARCHAR, lock_digest VARCHAR,
    execution JSON NOT NULL, environment JSON NOT NULL,
    attempts JSON NOT NULL,             -- every start of the work, where it took more than one process
    PRIMARY KEY (experiment, asset, version)
);

CREATE TABLE inputs (                   -- one row per input of an artifact
    experiment VARCHAR NOT NULL, asset VARCHAR NOT NULL, version VARCHAR NOT NULL, role VARCHAR NOT NULL,
    input_asset VARCHAR NOT NULL, input_version VARCHAR NOT NULL,
    input_digest VARCHAR NOT NULL, input_record_digest VARCHAR NOT NULL,
    record_digest VARCHAR NOT NULL,     -- of the artifact that was made
    acceptance VARCHAR                  -- statement by which alone the input counted as up to date
);

CREATE TABLE files (
    experiment VARCHAR NOT NULL, asset VARCHAR NOT NULL, version VARCHAR NOT NULL,
    area VARCHAR NOT NULL,              -- payload, run, manifest
    path VARCHAR NOT NULL, bytes BIGINT NOT NULL, sha256 VARCHAR NOT NULL
);

CREATE TABLE shards (                   -- from the manifest of a dataset
    experiment VARCHAR NOT NULL, asset VARCHAR NOT NULL, version VARCHAR NOT NULL,
    split VARCHAR, position INTEGER NOT NULL, name VARCHAR NOT NULL,
    rows BIGINT, tokens BIGINT, row_groups INTEGER, bytes BIGINT,
    sha256 JSON                         -- one digest, or one per file of the shard
);

CREATE TABLE sources (                  -- the code that decides the bytes
    experiment VARCHAR NOT NULL, asset VARCHAR NOT NULL, version VARCHAR NOT NULL,
    path VARCHAR NOT NULL, digest VARCHAR NOT NULL
);

CREATE TABLE packages (                 -- what was installed
    experiment VARCHAR NOT NULL, asset VARCHAR NOT NULL, version VARCHAR NOT NULL,
    package VARCHAR NOT NULL, package_version VARCHAR NOT NULL,
    decides BOOLEAN NOT NULL            -- its version decides the bytes, and is part of the fingerprint
);

CREATE TABLE metrics (                  -- one value per artifact and name
    experiment VARCHAR NOT NULL, asset VARCHAR NOT NULL, version VARCHAR NOT NULL,
    name VARCHAR NOT NULL, value DOUBLE, text VARCHAR
);

CREATE TABLE metric_points (            -- curves, thinned; the whole is in run/metrics.jsonl
    experiment VARCHAR NOT NULL, asset VARCHAR NOT NULL, version VARCHAR NOT NULL,
    step BIGINT NOT NULL, name VARCHAR NOT NULL, value DOUBLE NOT NULL
);

CREATE TABLE checks (
    experiment VARCHAR NOT NULL, asset VARCHAR NOT NULL, version VARCHAR NOT NULL,
    name VARCHAR NOT NULL, passed BOOLEAN NOT NULL, blocking BOOLEAN NOT NULL,
    severity VARCHAR NOT NULL, description VARCHAR NOT NULL, metadata JSON NOT NULL,
    outcome VARCHAR NOT NULL,           -- passed, failed, undetermined
    check_version VARCHAR,              -- of the check's code
    waived_by VARCHAR                   -- statement by which a person let it pass without a verdict
);

CREATE TABLE statements (               -- what is believed about an artifact, oldest first by position
    experiment VARCHAR NOT NULL, asset VARCHAR NOT NULL, version VARCHAR NOT NULL,
    record_digest VARCHAR NOT NULL, position INTEGER NOT NULL, id VARCHAR NOT NULL,
    kind VARCHAR NOT NULL, author VARCHAR NOT NULL, reason VARCHAR NOT NULL, time_utc TIMESTAMP NOT NULL,
    body JSON NOT NULL,
    in_force BOOLEAN NOT NULL           -- no later statement outdated it or took it back
);

CREATE TABLE evals (                    -- (asset, version) is the evaluation, object_* the evaluated
    experiment VARCHAR NOT NULL, asset VARCHAR NOT NULL, version VARCHAR NOT NULL,
    object_asset VARCHAR NOT NULL, object_version VARCHAR NOT NULL,
    suite VARCHAR NOT NULL, task VARCHAR NOT NULL,
    score DOUBLE NOT NULL, centered DOUBLE, correct INTEGER, total INTEGER, stderr DOUBLE
);

CREATE TABLE perf (
    experiment VARCHAR NOT NULL, asset VARCHAR NOT NULL, version VARCHAR NOT NULL,
    name VARCHAR NOT NULL, value DOUBLE NOT NULL, unit VARCHAR NOT NULL, device VARCHAR NOT NULL,
    context JSON NOT NULL
);

CREATE VIEW latest AS
SELECT * FROM artifacts
QUALIFY row_number() OVER (PARTITION BY experiment, asset ORDER BY sequence DESC) = 1;

-- Everything an artifact came from, however far; depth 1 is its own inputs, the shortest way counts. Followed
-- from record to record; acceptances are the statements on which the ways from it rest.
CREATE VIEW ancestry AS
WITH RECURSIVE walk AS (
    SELECT experiment, asset, version, input_asset AS ancestor_asset, input_version AS ancestor_version,
           input_digest AS ancestor_digest, input_record_digest AS ancestor_record_digest, acceptance, 1 AS depth
    FROM inputs
    UNION
    SELECT walk.experiment, walk.asset, walk.version, up.input_asset, up.input_version,
           up.input_digest, up.input_record_digest, up.acceptance, walk.depth + 1
    FROM walk
    JOIN inputs AS up ON up.record_digest = walk.ancestor_record_digest
    WHERE walk.depth < 100              -- records cannot form a cycle; a forged index could
)
SELECT experiment, asset, version, ancestor_asset, ancestor_version, ancestor_digest, ancestor_record_digest,
       min(depth) AS depth,
       coalesce(list(DISTINCT acceptance) FILTER (acceptance IS NOT NULL), []) AS acceptances
FROM walk
GROUP BY experiment, asset, version, ancestor_asset, ancestor_version, ancestor_digest, ancestor_record_digest;

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
-- acceptances are those in force about the version itself: it is reused for other code by them.
CREATE VIEW drift AS
WITH reasons AS (
    SELECT a.experiment, a.asset, a.version, a.record_digest,
           CASE WHEN up.depth = 1 THEN 'input' ELSE 'ancestor' END AS reason,
           up.ancestor_asset AS cause, up.ancestor_version AS used_version, now_.version AS current_version
    FROM latest AS a
    JOIN ancestry AS up USING (experiment, asset, version)
    JOIN latest AS now_ ON now_.experiment = a.experiment AND now_.asset = up.ancestor_asset
    WHERE now_.digest <> up.ancestor_digest
    UNION ALL
    SELECT a.experiment, a.asset, a.version, a.record_digest, 'recipe', a.asset, before.version, a.version
    FROM latest AS a
    JOIN artifacts AS before ON before.experiment = a.experiment AND before.asset = a.asset
    WHERE before.code_version <> a.code_version
      AND before.sequence = (SELECT max(b.sequence) FROM artifacts AS b
                             WHERE b.experiment = a.experiment AND b.asset = a.asset AND b.sequence < a.sequence)
    UNION ALL
    SELECT DISTINCT a.experiment, a.asset, a.version, a.record_digest, 'acceptance', up.ancestor_asset,
           up.ancestor_version, now_.version
    FROM latest AS a
    JOIN (SELECT *, unnest(acceptances) AS acceptance FROM ancestry) AS up USING (experiment, asset, version)
    JOIN acceptances AS said ON said.id = up.acceptance AND NOT said.in_force
    LEFT JOIN latest AS now_ ON now_.experiment = a.experiment AND now_.asset = up.ancestor_asset
)
SELECT experiment, asset, version, reason, cause, used_version, current_version,
       coalesce((SELECT list(id) FROM acceptances AS said
                 WHERE said.record_digest = reasons.record_digest AND said.in_force), []) AS acceptances
FROM reasons;

-- The rungs: latest checkpoints (whatever reports its parameters), in the order in which they come from each other.
CREATE VIEW ladder AS
WITH checkpoints AS (
    SELECT a.*, m.value AS parameters
    FROM latest AS a
    JOIN metrics AS m USING (experiment, asset, version)
    WHERE m.name = 'parameters'
)
SELECT c.experiment,
       (SELECT count(DISTINCT up.ancestor_asset) FROM ancestry AS up
        JOIN metrics AS m ON m.experiment = up.experiment AND m.asset = up.ancestor_asset
            AND m.version = up.ancestor_version AND m.name = 'parameters'
        WHERE up.experiment = c.experiment AND up.asset = c.asset AND up.version = c.version) AS rung,
       c.asset, c.version,
       CAST(any_value(m.value) FILTER (m.name = 'num_layers') AS INTEGER) AS layers,
       CAST(any_value(m.value) FILTER (m.name = 'hidden_size') AS INTEGER) AS hidden_size,
       CAST(any_value(c.parameters) AS BIGINT) AS parameters,
       CAST(any_value(m.value) FILTER (m.name = 'active_parameters') AS BIGINT) AS active_parameters,
       any_value(m.value) FILTER (m.name = 'loss') AS loss,
       any_value(m.value) FILTER (m.name = 'valid_loss') AS valid_loss,
       any_value(c.blocked) AS blocked, any_value(c.digest) AS digest, any_value(c.published_utc) AS published_utc,
       -- Statements of persons on which it or anything that it came from rests.
       list_sort(list_distinct(
           coalesce((SELECT flatten(list(up.acceptances)) FROM ancestry AS up
                     WHERE up.experiment = c.experiment AND up.asset = c.asset AND up.version = c.version), [])
           || coalesce((SELECT list(id) FROM acceptances AS said
                        WHERE said.experiment = c.experiment AND said.asset = c.asset
                          AND said.version = c.version AND said.in_force), []))) AS acceptances
FROM checkpoints AS c
JOIN metrics AS m USING (experiment, asset, version)
GROUP BY c.experiment, c.asset, c.version
ORDER BY c.experiment, rung, c.asset;

-- Who scores best; for an object that was evaluated several times the newest evaluation counts.
CREATE VIEW leaderboard AS
WITH newest AS (
    SELECT e.*
    FROM evals AS e
    JOIN artifacts AS a USING (experiment, asset, version)
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
