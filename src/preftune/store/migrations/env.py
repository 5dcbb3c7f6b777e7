"""What Alembic runs: migrations on the connection that ``upgrade`` hands over, inside its transaction."""

from alembic import context

from preftune.store.tables import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, render_as_batch=connection.dialect.name == "sqlite")
context.run_migrations()
