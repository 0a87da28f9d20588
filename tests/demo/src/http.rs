//! The other transport: what a controller does over HTTP, at one of the gateways in turn.

use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, ensure};
use lethe_domain::opendsr::ApiVersion;
use lethe_domain::request::ControllerId;
use reqwest::{Method, RequestBuilder};
use url::Url;

use crate::world::World;

/// The gateways, as a load balancer would stand before them.
pub(crate) struct Http<'a> {
    world: &'a World,
    client: reqwest::Client,
    turn: AtomicUsize,
}

impl<'a> Http<'a> {
    pub(crate) fn new(world: &'a World) -> anyhow::Result<Self> {
        ensure!(!world.gateways.is_empty(), "no gateway runs");
        Ok(Self { world, client: reqwest::Client::builder().no_proxy().build()?, turn: AtomicUsize::new(0) })
    }

    fn call(&self, method: Method, path: &str) -> anyhow::Result<RequestBuilder> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % self.world.gateways.len();
        let gateway = self.world.gateways.get(turn).context("no gateway runs")?;
        Ok(self.client.request(method, format!("{gateway}{path}")))
    }

    fn call_of(&self, controller_id: &ControllerId, method: Method, path: &str) -> anyhow::Result<RequestBuilder> {
        let index = self.world.controllers.iter().position(|one| one == controller_id);
        let credentials =
            index.and_then(|index| self.world.credentials.get(index)).context("a controller of the demo")?;
        Ok(self.call(method, path)?.basic_auth(&credentials.api_key, Some(&credentials.api_secret)))
    }

    /// Hands a request in; the answer's status and body.
    pub(crate) async fn submit(
        &self,
        controller_id: &ControllerId,
        version: ApiVersion,
        body: Vec<u8>,
    ) -> anyhow::Result<(u16, serde_json::Value)> {
        let call = self.call_of(controller_id, Method::POST, &requests(version))?;
        answer(call.header("content-type", "application/json").body(body)).await
    }

    /// Cancels a request; the answer's status and body.
    pub(crate) async fn cancel(
        &self,
        controller_id: &ControllerId,
        version: ApiVersion,
        id: &str,
    ) -> anyhow::Result<(u16, serde_json::Value)> {
        answer(self.call_of(controller_id, Method::DELETE, &format!("{}/{id}", requests(version)))?).await
    }

    /// The bytes of a result.
    pub(crate) async fn download(&self, results_url: &str) -> anyhow::Result<Vec<u8>> {
        let response = self.call(Method::GET, Url::parse(results_url)?.path())?.send().await?.error_for_status()?;
        Ok(response.bytes().await?.to_vec())
    }
}

fn requests(version: ApiVersion) -> String {
    let name = if version == ApiVersion::V1 { "opengdpr_requests" } else { "requests" };
    format!("/{}/{name}", version.path())
}

async fn answer(call: RequestBuilder) -> anyhow::Result<(u16, serde_json::Value)> {
    let response = call.send().await?;
    let status = response.status().as_u16();
    Ok((status, serde_json::from_slice(&response.bytes().await?)?))
}
