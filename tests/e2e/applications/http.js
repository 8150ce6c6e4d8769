// SPDX-License-Identifier: Apache-2.0
// Node's http server and client: `node http.js serve PORT` answers with what it was sent;
// `node http.js ask PORT N` sends N bodies of growing size on one connection and checks each.
"use strict";
const http = require("http");
const [, , role, port, count] = process.argv;

function body(number) {
	return Buffer.alloc((number * 7919) % 200000, `body ${number} `);
}

if (role === "serve") {
	http.createServer((request, response) => request.pipe(response)).listen(port, "127.0.0.1");
} else {
	const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });
	const ask = (number) => {
		if (number === Number(count)) {
			console.log(`ok ${number}`);
			agent.destroy();
			return;
		}
		const options = { port, agent, method: "POST", host: "127.0.0.1" };
		const request = http.request(options, (response) => {
			const parts = [];
			response.on("data", (part) => parts.push(part));
			response.on("end", () => {
				if (!Buffer.concat(parts).equals(body(number))) {
					console.log(`body ${number} differs`);
					process.exit(1);
				}
				ask(number + 1);
			});
		});
		request.end(body(number));
	};
	ask(0);
}
