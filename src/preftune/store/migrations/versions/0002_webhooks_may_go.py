"""Webhooks may be deleted."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """A webhook that was taken away stays as a row, so that what it was told can be explained."""
    op.add_column("webhooks", sa.Column("deleted_at", sa.DateTime(timezone=True)))


def downgrade() -> None:
    """Forget which ones were taken away."""
    op.drop_column("webhooks", "deleted_at")
