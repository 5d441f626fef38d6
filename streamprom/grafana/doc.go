// Package grafana has no code. Its file streams.json is a dashboard of Grafana for the metrics of package streamprom.
// Its tests run the queries of the dashboard with the engine of Prometheus on metrics of real streams. It is a module
// of its own, so that streamprom does not depend on that engine.
package grafana
