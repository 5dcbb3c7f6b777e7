"""The only writer of the database: records, one protocol, and three back ends (SQLite, PostgreSQL, memory)."""
