-- The tables of queuectl, whole and current. Running this twice, or over an older
-- schema, changes nothing; `queuectl db init` does the same and also upgrades.
CREATE DATABASE IF NOT EXISTS `queuectl`
  DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
USE `queuectl`;

CREATE TABLE IF NOT EXISTS config (
  `key`      VARCHAR(64) NOT NULL PRIMARY KEY,
  value      VARCHAR(1024) COLLATE utf8mb4_bin NOT NULL,
  changed_at DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6) + INTERVAL 0 SECOND)
) ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin;
INSERT IGNORE INTO config (`key`, value) VALUES
  ('schema_version', '1/1');

-- Every column but `command` has a default, so that an application may enqueue with
-- INSERT INTO jobs (command) VALUES ('...') inside its own transaction. Lengths have
-- some room, so that a session without a strict mode is refused what it would cut.
-- A dump of either server loads into the other: MySQL writes REGEXP as a function that
-- MariaDB lacks, and MariaDB writes a default that is a mere call as MySQL reads none.
CREATE TABLE IF NOT EXISTS jobs (
  seq         BIGINT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY,
  id          VARCHAR(160) NOT NULL DEFAULT (CAST(UUID() AS CHAR)),
  command     MEDIUMTEXT COLLATE utf8mb4_bin NOT NULL,
  queue       VARCHAR(80) NOT NULL DEFAULT 'default',
  state       VARCHAR(20) NOT NULL DEFAULT 'pending',
  priority    INT NOT NULL DEFAULT 0,
  claim_order INT GENERATED ALWAYS AS (-priority) STORED,
  attempts INT NOT NULL DEFAULT 0, max_attempts INT NULL, max_retries INT NULL,
  runs     INT NOT NULL DEFAULT 0, losses INT NOT NULL DEFAULT 0,
  timeout  DOUBLE NULL, backoff_base DOUBLE NULL,
  permanent_exit_codes VARCHAR(1024) NULL, on_lost VARCHAR(20) NULL,
  cwd      TEXT COLLATE utf8mb4_bin NULL, env MEDIUMTEXT COLLATE utf8mb4_bin NULL,
  on_failure MEDIUMTEXT COLLATE utf8mb4_bin NULL, signature VARCHAR(64) NULL,
  schedule VARCHAR(64) NULL, batch CHAR(16) NULL,
  unique_key VARCHAR(128) COLLATE utf8mb4_bin NULL,
  live_key VARCHAR(128) COLLATE utf8mb4_bin GENERATED ALWAYS AS
           (CASE WHEN state IN ('completed', 'dead', 'cancelled') THEN NULL
                 ELSE unique_key END) STORED,
  touched INT NOT NULL DEFAULT 0, has_children TINYINT NOT NULL DEFAULT 0,
  next_run_at DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6) + INTERVAL 0 SECOND),
  created_at  DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6) + INTERVAL 0 SECOND),
  started_at  DATETIME(6) NULL, finished_at DATETIME(6) NULL,
  cancel_requested_at DATETIME(6) NULL, duration DOUBLE NULL, exit_code INT NULL,
  reason VARCHAR(16) NULL, worker VARCHAR(64) NULL, token CHAR(16) NULL,
  UNIQUE KEY jobs_id (id),
  UNIQUE KEY jobs_live_key (live_key),
  KEY jobs_claim (state, queue, claim_order, seq),
  KEY jobs_due (state, next_run_at),
  CONSTRAINT jobs_state CHECK (state IN ('pending', 'processing', 'completed', 'failed',
                                         'dead', 'scheduled', 'blocked', 'cancelled')
                               AND REGEXP_INSTR(state, '[^a-z]') = 0),
  CONSTRAINT jobs_id_form CHECK (LENGTH(id) <= 128
                                 AND REGEXP_INSTR(id, '^[A-Za-z0-9]') = 1
                                 AND REGEXP_INSTR(id, '[^A-Za-z0-9._:@+-]') = 0),
  CONSTRAINT jobs_queue_form CHECK (LENGTH(queue) <= 64
                                    AND REGEXP_INSTR(queue, '^[A-Za-z0-9]') = 1
                                    AND REGEXP_INSTR(queue, '[^A-Za-z0-9._:@+-]') = 0),
  CONSTRAINT jobs_command_form CHECK (LENGTH(command) BETWEEN 1 AND 131000),
  CONSTRAINT jobs_priority CHECK (priority BETWEEN -1000000 AND 1000000),
  CONSTRAINT jobs_max_retries CHECK (max_retries BETWEEN 0 AND 1000),
  CONSTRAINT jobs_timeout CHECK (timeout >= 0),
  CONSTRAINT jobs_on_lost CHECK (on_lost IN ('retry', 'dead')
                                 AND REGEXP_INSTR(on_lost, '[^a-z]') = 0)
) ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin;

-- Which job waits for which: needs is 'completed' or 'ended'.
CREATE TABLE IF NOT EXISTS dependencies (
  parent BIGINT UNSIGNED NOT NULL,
  child  BIGINT UNSIGNED NOT NULL,
  needs  VARCHAR(9) NOT NULL DEFAULT 'completed',
  PRIMARY KEY (parent, child),
  KEY dependencies_child (child)
) ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin;

-- History: a row for each run that ended, or that has output to show.
CREATE TABLE IF NOT EXISTS runs (
  job_seq BIGINT UNSIGNED NOT NULL, run INT NOT NULL, attempt INT NOT NULL,
  worker VARCHAR(64) NULL, started_at DATETIME(6) NULL, finished_at DATETIME(6) NULL,
  duration DOUBLE NULL, exit_code INT NULL, reason VARCHAR(16) NULL,
  detail VARCHAR(1024) COLLATE utf8mb4_bin NULL,
  output LONGBLOB NULL, output_bytes BIGINT NOT NULL DEFAULT 0,
  PRIMARY KEY (job_seq, run)
) ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin;

CREATE TABLE IF NOT EXISTS dlq (
  job_seq BIGINT UNSIGNED NOT NULL PRIMARY KEY, id VARCHAR(128) NOT NULL,
  died_at DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6) + INTERVAL 0 SECOND),
  exit_code INT NULL, reason VARCHAR(16) NULL,
  last_line VARCHAR(255) COLLATE utf8mb4_bin NULL,
  UNIQUE KEY dlq_id (id),
  KEY dlq_died (died_at)
) ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin;

CREATE TABLE IF NOT EXISTS workers (
  id VARCHAR(64) NOT NULL PRIMARY KEY,
  host VARCHAR(255) COLLATE utf8mb4_bin NOT NULL, pid BIGINT NOT NULL,
  supervisor BIGINT NOT NULL, process_identity VARCHAR(255) NOT NULL,
  slots INT NOT NULL, queues TEXT NULL, state VARCHAR(10) NOT NULL DEFAULT 'running',
  beat BIGINT NOT NULL DEFAULT 0, lease_s DOUBLE NOT NULL,
  started_at   DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6) + INTERVAL 0 SECOND),
  heartbeat_at DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6) + INTERVAL 0 SECOND),
  lost_at      DATETIME(6) NULL
) ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin;

CREATE TABLE IF NOT EXISTS queues (
  name VARCHAR(64) NOT NULL PRIMARY KEY, max_running INT NULL,
  paused_at DATETIME(6) NULL, touched BIGINT NOT NULL DEFAULT 0
) ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin;

CREATE TABLE IF NOT EXISTS schedules (
  name VARCHAR(64) NOT NULL PRIMARY KEY, timing VARCHAR(255) NOT NULL,
  zone VARCHAR(64) NOT NULL DEFAULT 'UTC',
  job  MEDIUMTEXT COLLATE utf8mb4_bin NOT NULL,
  next_run_at DATETIME(6) NULL, last_run_at DATETIME(6) NULL,
  last_job VARCHAR(128) NULL, paused_at DATETIME(6) NULL,
  created_at DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6) + INTERVAL 0 SECOND),
  KEY schedules_due (next_run_at)
) ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin;
