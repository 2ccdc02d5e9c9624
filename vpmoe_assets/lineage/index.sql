-- The index of all records. Derived from them alone: `vpmoe index rebuild` makes it again at any time.
-- record_digest is the key of an artifact everywhere, and so are (experiment, asset, version). Digests are sha256
-- in hex, sizes bytes, times UTC, durations seconds, losses nats per token.

CREATE TABLE meta (schema_version INTEGER NOT NULL);

CREATE TABLE artifacts (
    experiment VARCHAR NOT NULL, asset VARCHAR NOT NULL, version VARCHAR NOT NULL,
    sequence INTEGER NOT NULL,          -- the highest of an asset is its latest
    fingerprint VARCHAR NOT NULL,       -- how it was made: recipe, sources, inputs
    code_version VARCHAR NOT NULL,      -- the same without the inputs
    recipe_digest VARCHAR NOT NULL,     -- the recipe alone
    digest VARCHAR NOT NULL,            -- what it is: Merkle root of the payload
    record_digest VARCHAR NOT NULL UNIQUE,
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
    record_digest VARCHAR NOT NULL,
    dagster_run_id VARCHAR, command VARCHAR NOT NULL,
    started_utc TIMESTAMP NOT NULL, finished_utc TIMESTAMP NOT NULL,
    duration_s DOUBLE NOT NULL,         -- worked, over all attempts; pauses between them do not count
    device VARCHAR, host VARCHAR, python VARCHAR, torch VARCHAR, megatron_core VARCHAR, cuda VARCHAR, lock_digest VARCHAR,
    execution JSON NOT NULL, environment JSON NOT NULL,
    PRIMARY KEY (experiment, asset, version)
);

CREATE TABLE attempts (                 -- every start of the work; one where nothing interrupted it
    experiment VARCHAR NOT NULL, asset VARCHAR NOT NULL, version VARCHAR NOT NULL,
    record_digest VARCHAR NOT NULL,
    position INTEGER NOT NULL,
    started_utc TIMESTAMP NOT NULL, ended_utc TIMESTAMP,
    ended VARCHAR NOT NULL,             -- done, interrupted, failed: reason, killed
    resumed_from BIGINT,                -- step of the checkpoint that it went on from
    sources VARCHAR                     -- sha256 of the snapshot that it ran from
);

CREATE TABLE inputs (                   -- one row for each record that an artifact's record names
    experiment VARCHAR NOT NULL, asset VARCHAR NOT NULL, version VARCHAR NOT NULL,
    record_digest VARCHAR NOT NULL,     -- of the artifact that was made
    kind VARCHAR NOT NULL,              -- input; or original: whose files these are, where they were not made anew
    role VARCHAR NOT NULL,
    input_experiment VARCHAR NOT NULL, input_asset VARCHAR NOT NULL, input_version VARCHAR NOT NULL,
    input_digest VARCHAR NOT NULL, input_record_digest VARCHAR NOT NULL,
    acceptance VARCHAR                  -- statement by which alone the input counted as up to date
);

CREATE TABLE files (
    experiment VARCHAR NOT NULL, asset VARCHAR NOT NULL, version VARCHAR NOT NULL,
    record_digest VARCHAR NOT NULL,
    area VARCHAR NOT NULL,              -- payload, run, manifest
    path VARCHAR NOT NULL, bytes BIGINT NOT NULL, sha256 VARCHAR NOT NULL
);

CREATE TABLE shards (                   -- from the manifest of a dataset
    experiment VARCHAR NOT NULL, asset VARCHAR NOT NULL, version VARCHAR NOT NULL,
    record_digest VARCHAR NOT NULL,
    split VARCHAR, position INTEGER NOT NULL, name VARCHAR NOT NULL,
    rows BIGINT, tokens BIGINT, row_groups INTEGER, bytes BIGINT,
    sha256 JSON                         -- one digest, or one per file of the shard
);

CREATE TABLE recipe_keys (              -- the resolved recipe, leaf by leaf
    experiment VARCHAR NOT NULL, asset VARCHAR NOT NULL, version VARCHAR NOT NULL,
    record_digest VARCHAR NOT NULL,
    key VARCHAR NOT NULL,               -- dotted: training.lr
    value VARCHAR NOT NULL,             -- as JSON
    number DOUBLE                       -- the same, where it is one
);

CREATE TABLE sources (                  -- the code that decides the bytes
    experiment VARCHAR NOT NULL, asset VARCHAR NOT NULL, version VARCHAR NOT NULL,
    record_digest VARCHAR NOT NULL,
    path VARCHAR NOT NULL, digest VARCHAR NOT NULL
);

CREATE TABLE packages (                 -- what was installed
    experiment VARCHAR NOT NULL, asset VARCHAR NOT NULL, version VARCHAR NOT NULL,
    record_digest VARCHAR NOT NULL,
    package VARCHAR NOT NULL, package_version VARCHAR NOT NULL,
    decides BOOLEAN NOT NULL            -- its version decides the bytes, and is part of the fingerprint
);

CREATE TABLE metrics (                  -- one value per artifact and name
    experiment VARCHAR NOT NULL, asset VARCHAR NOT NULL, version VARCHAR NOT NULL,
    record_digest VARCHAR NOT NULL,
    name VARCHAR NOT NULL, value DOUBLE, text VARCHAR
);

CREATE TABLE metric_points (            -- curves, thinned; the whole is in run/metrics.jsonl
    experiment VARCHAR NOT NULL, asset VARCHAR NOT NULL, version VARCHAR NOT NULL,
    record_digest VARCHAR NOT NULL,
    step BIGINT NOT NULL, name VARCHAR NOT NULL, value DOUBLE NOT NULL
);

CREATE TABLE checks (
    experiment VARCHAR NOT NULL, asset VARCHAR NOT NULL, version VARCHAR NOT NULL,
    record_digest VARCHAR NOT NULL,
    name VARCHAR NOT NULL, passed BOOLEAN NOT NULL, blocking BOOLEAN NOT NULL,
    severity VARCHAR NOT NULL, description VARCHAR NOT NULL, metadata JSON NOT NULL,
    outcome VARCHAR NOT NULL,           -- passed, failed, undetermined
    check_version VARCHAR,              -- of the check's code
    waived_by VARCHAR                   -- statement by which a person let it pass without a verdict
);

CREATE TABLE statements (               -- what is believed about an artifact, oldest first by position
    experiment VARCHAR NOT NULL, asset VARCHAR NOT NULL, version VARCHAR NOT NULL,
    record_digest VARCHAR NOT NULL,
    position INTEGER NOT NULL, id VARCHAR NOT NULL,
    kind VARCHAR NOT NULL, author VARCHAR NOT NULL, reason VARCHAR NOT NULL, time_utc TIMESTAMP NOT NULL,
    body JSON NOT NULL,
    in_force BOOLEAN NOT NULL           -- no later statement outdated it or took it back
);

CREATE TABLE evals (                    -- (asset, version) is the evaluation, object_* the evaluated
    experiment VARCHAR NOT NULL, asset VARCHAR NOT NULL, version VARCHAR NOT NULL,
    record_digest VARCHAR NOT NULL,
    object_asset VARCHAR NOT NULL, object_version VARCHAR NOT NULL,
    suite VARCHAR NOT NULL, task VARCHAR NOT NULL,
    score DOUBLE NOT NULL, centered DOUBLE, correct INTEGER, total INTEGER, stderr DOUBLE
);

CREATE TABLE perf (
    experiment VARCHAR NOT NULL, asset VARCHAR NOT NULL, version VARCHAR NOT NULL,
    record_digest VARCHAR NOT NULL,
    name VARCHAR NOT NULL, value DOUBLE NOT NULL, unit VARCHAR NOT NULL, device VARCHAR NOT NULL,
    context JSON NOT NULL
);
