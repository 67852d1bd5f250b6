"""The ledger: rules, their store in PostgreSQL, and what is read from it. Knows neither Celery nor HTTP."""
