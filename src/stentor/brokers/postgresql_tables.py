"""What the PostgreSQL broker makes in its schema: its tables, and functions where one round trip is to do."""

VERSION = 1
TABLES = """
CREATE TABLE version (version int NOT NULL);
CREATE TABLE topic (name text PRIMARY KEY, id serial UNIQUE, last bigint NOT NULL DEFAULT 0);
CREATE TABLE event (topic int, part int, seq bigint, ts float8 NOT NULL, body bytea NOT NULL,
                    PRIMARY KEY (topic, part, seq));
CREATE TABLE batch (who text PRIMARY KEY, number bigint NOT NULL, result bigint[] NOT NULL, ts float8 NOT NULL);
ALTER TABLE batch ALTER result SET STORAGE EXTERNAL;
CREATE TABLE space (space text, name text, value bytea NOT NULL, PRIMARY KEY (space, name));
CREATE TABLE lease (name text PRIMARY KEY, value bytea NOT NULL, until timestamptz NOT NULL);
CREATE TABLE seen (id text PRIMARY KEY, ts float8 NOT NULL);
CREATE INDEX seen_ts ON seen (ts);
CREATE TABLE delayed (n bigserial PRIMARY KEY, prefix text NOT NULL, due float8 NOT NULL, id text NOT NULL,
                      body bytea NOT NULL);
CREATE INDEX delayed_due ON delayed (due);

-- Events of one topic; the place of the first of them.
CREATE FUNCTION put(at float8, of_topic int, parts int[], bodies bytea[]) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE first bigint;
BEGIN
  UPDATE topic SET last = last + cardinality(parts) WHERE id = of_topic
    RETURNING last - cardinality(parts) + 1 INTO first;
  INSERT INTO event SELECT of_topic, e.part, first + e.n - 1, at, e.body
    FROM unnest(parts, bodies) WITH ORDINALITY AS e(part, body, n);
  PERFORM pg_notify(current_schema(), '');
  RETURN first;
END $$;

-- The last batch of a process; until the transaction ends, there can be no further one.
CREATE FUNCTION last_batch(process text) RETURNS batch LANGUAGE plpgsql AS $$
DECLARE held batch;
BEGIN
  SELECT * INTO held FROM batch WHERE who = process FOR UPDATE;
  IF NOT FOUND THEN
    INSERT INTO batch VALUES (process, 0, '{}', 0) ON CONFLICT DO NOTHING;
    SELECT * INTO held FROM batch WHERE who = process FOR UPDATE;
  END IF;
  RETURN held;
END $$;

-- A batch of events of one topic; a repeated one is answered as it was, a late one refused.
CREATE FUNCTION append(at float8, process text, turn bigint, of_topic int, parts int[], bodies bytea[])
RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE held batch := last_batch(process); first bigint;
BEGIN
  IF held.number = turn THEN RETURN held.result[1]; END IF;
  IF held.number > turn THEN RAISE 'a later batch is stored already'; END IF;
  first := put(at, of_topic, parts, bodies);
  UPDATE batch SET number = turn, result = ARRAY[first], ts = at WHERE who = process;
  RETURN first;
END $$;
"""
