"""What several tests share: builders of models and adapters, oracles, servers, assertions. No test is in here."""
