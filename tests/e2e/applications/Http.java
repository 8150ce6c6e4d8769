// SPDX-License-Identifier: Apache-2.0
// The JDK's http server and client: `java Http.java serve PORT` answers with what it was
// sent; `java Http.java ask PORT N` sends N bodies of growing size and checks each.
import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.util.Arrays;

public class Http {
	static byte[] body(int number) {
		byte[] bytes = new byte[number * 7919 % 200000];
		for (int i = 0; i < bytes.length; i++)
			bytes[i] = (byte) (number + i * 31);
		return bytes;
	}

	public static void main(String[] words) throws Exception {
		int port = Integer.parseInt(words[1]);
		if (words[0].equals("serve")) {
			HttpServer server = HttpServer.create(new InetSocketAddress("127.0.0.1", port), 0);
			server.createContext("/", exchange -> {
				byte[] received = exchange.getRequestBody().readAllBytes();
				exchange.sendResponseHeaders(200, received.length == 0 ? -1 : received.length);
				exchange.getResponseBody().write(received);
				exchange.close();
			});
			server.start();
			return;
		}
		HttpClient client =
			HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();
		URI uri = URI.create("http://127.0.0.1:" + port + "/");
		int count = Integer.parseInt(words[2]);
		for (int number = 0; number < count; number++) {
			HttpRequest request =
				HttpRequest.newBuilder(uri)
					.POST(HttpRequest.BodyPublishers.ofByteArray(body(number)))
					.build();
			byte[] got = client.send(request, HttpResponse.BodyHandlers.ofByteArray()).body();
			if (!Arrays.equals(got, body(number)))
				throw new Exception("body " + number + " differs");
		}
		System.out.println("ok " + count);
		System.exit(0);
	}
}
