-- SPDX-License-Identifier: Apache-2.0
-- What wrk found, as one line of JSON. Nothing here runs while it measures.
function done(summary, latency, requests)
	local errors = summary.errors
	io.write(string.format(
		'JSON {"requests": %d, "seconds": %.6f, "bytes": %d, ' ..
		'"p50_us": %d, "p99_us": %d, "p999_us": %d, "max_us": %d, ' ..
		'"connect_errors": %d, "read_errors": %d, "write_errors": %d, ' ..
		'"timeouts": %d, "bad_status": %d}\n',
		summary.requests, summary.duration / 1e6, summary.bytes,
		latency:percentile(50), latency:percentile(99), latency:percentile(99.9), latency.max,
		errors.connect, errors.read, errors.write, errors.timeout, errors.status))
end
